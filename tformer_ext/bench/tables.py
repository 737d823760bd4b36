"""Results on the terminal."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from .accuracy import Errors
from .bars import Bar
from .job import OURS
from .record import Record, best_peer, by_case
from .weather import ENOUGH, STILL


def print_cases(console: Console, records: Iterable[Record]) -> None:
    """A table for each group: ours, how many times as long each peer takes, how near the floor we are, and how many
    batches of the contender that had fewest were in still weather."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    for group, members in groups.items():
        peers = list(dict.fromkeys(r.contender for r in members if r.contender != OURS))
        columns = (
            "case",
            "dtype",
            "",
            "ours us",
            *(f"{p} x" for p in peers),
            "floor %",
            "FMA %",
            "extra MiB",
            "still",
        )
        table = Table(*columns, title=group, title_justify="left")
        for contenders in by_case(members).values():
            ours, best = contenders[OURS], best_peer(contenders)
            cells = [_ratio(contenders.get(name), best) for name in peers]
            extra = None if ours.extra_bytes is None else ours.extra_bytes / 2**20
            figures = (ours.percent_of_floor, ours.percent_of_fma, extra, _still(contenders))
            row = (ours.case, ours.dtype, ours.direction[:3], f"{ours.median_us:.4g}", *cells)
            table.add_row(*row, *("" if f is None else f"{f:.3g}" for f in figures))
        console.print(table)


def _ratio(record: Record | None, best: Record | None) -> str:
    if record is None:
        return ""
    text = f"{record.ratio_to_ours:.2f}"
    if record is not best:
        return text
    return f"[green]{text}[/]" if record.ratio_to_ours >= 1 else f"[red]{text}[/]"


def _still(contenders: dict[str, Record]) -> int | None:
    return min((r.still_batches for r in contenders.values() if r.still_batches is not None), default=None)


def print_bars(console: Console, bars: Iterable[Bar], records: list[Record]) -> None:
    """The bars, and how many cases they were measured by in a machine that was busy with other things."""
    table = Table("bar", "required", "measured", "", "decided by", title="bars", title_justify="left")
    for bar in bars:
        colour = {None: "dim", True: "green", False: "red"}[bar.holds]
        measured = "" if bar.measured is None else f"{bar.measured:.3g}"
        table.add_row(bar.name, bar.required, measured, f"[{colour}]{bar.verdict()}[/]", bar.detail)
    console.print(table)
    cases = by_case(records).values()
    if restless := sum(any(r.is_restless for r in contenders.values()) for contenders in cases):
        speed = f"{100 * STILL:.0f} % of the machine's usual best speed"
        few = f"fewer than {ENOUGH} batches (1 of long calls)"
        console.print(f"{restless} of {len(cases)} cases have {few} at {speed} (still)")


def print_errors(console: Console, errors: Iterable[Errors]) -> None:
    title = "largest error against float64, over the largest element"
    table = Table("operation", "dtype", "result", "ours", "torch", title=title, title_justify="left")
    for e in errors:
        table.add_row(e.operation, e.dtype, e.result, f"{e.ours:.2g}", f"{e.torch:.2g}")
    console.print(table)


def print_changes(console: Console, changes: list[tuple[Record, float]], name: str) -> None:
    table = Table("case", "dtype", "", "time now / then", title=f"changes from {name}", title_justify="left")
    for record, ratio in changes:
        colour = "red" if ratio > 1 else "green"
        table.add_row(record.case, record.dtype, record.direction, f"[{colour}]{ratio:.2f}[/]")
    console.print(table if changes else f"nothing changed by more than a tenth from {name}")
