"""Results as pictures."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt

from .job import OURS
from .record import Record, by_case


def save(folder: Path, stem: str, records: Iterable[Record]) -> list[Path]:
    """A PNG for each group that has floors: how many times as long each peer takes, and our share of the floor."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    written = []
    for group, members in groups.items():
        for direction in ("forward", "backward"):
            chosen = [r for r in members if r.direction == direction and r.percent_of_floor is not None]
            if chosen:
                written.append(folder / f"{stem}-{group}-{direction}.png")
                _save_group(written[-1], f"{group}, {direction}", chosen)
    return written


def _save_group(path: Path, title: str, records: list[Record]) -> None:
    cases = by_case(records)
    labels = [f"{case} {dtype}" for _, case, dtype, _ in cases]
    places = range(len(cases))
    height = 1 + 0.22 * len(cases)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), sharey=True, layout="constrained")
    peers = list(dict.fromkeys(r.contender for r in records if r.contender != OURS))
    for peer in peers:
        found = [(n, c[peer].ratio_to_ours) for n, c in zip(places, cases.values(), strict=True) if peer in c]
        left.plot([x for _, x in found], [n for n, _ in found], "o", markersize=4, label=peer)
    left.axvline(1, color="black", linewidth=0.8)
    left.set(title=f"{title}: time of peers / ours", xscale="log", yticks=places, yticklabels=labels)
    left.tick_params(axis="y", labelsize=7)
    left.legend()
    right.barh(places, [c[OURS].percent_of_floor for c in cases.values()])
    right.set(title="ours: % of the floor of this machine", xlim=(0, 110))
    left.invert_yaxis()
    figure.savefig(path, dpi=100)
    plt.close(figure)
