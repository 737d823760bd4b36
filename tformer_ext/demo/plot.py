"""The demo's plot."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt

from .search import Search
from .training import Run


def save(path: Path, found: Search, learned: dict[str, Run]) -> None:
    """Writes a PNG: both loss curves, time per training step, time of the search."""
    figure, (curve, step, search) = plt.subplots(1, 3, figsize=(12, 4), width_ratios=(2, 1, 1), layout="constrained")
    for name, record in learned.items():
        curve.plot(record.losses, label=name, linewidth=1)
    curve.set(title="loss while training", xlabel="step", ylabel="nats per character")
    curve.legend()
    step.boxplot([record.milliseconds for record in learned.values()], showfliers=False, tick_labels=list(learned))
    step.set(title="a training step", ylabel="milliseconds", ylim=(0, None))
    search.bar(list(found.milliseconds), list(found.milliseconds.values()))
    search.set(title="embedding with MiniLM", ylabel="milliseconds")
    figure.savefig(path, dpi=120)
    plt.close(figure)
