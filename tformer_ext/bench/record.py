"""One measured figure and how figures are found again: what the tables, files, plots and bars are made of."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from .weather import ENOUGH


@dataclass
class Record:
    """One contender in one case. Times in microseconds per call; None where a figure has no meaning."""

    group: str
    case: str
    dtype: str
    direction: str  # forward or backward; of a module training (both) or eval
    contender: str
    is_peer: bool  # does the same job as ours
    tags: str  # words separated by spaces: what the bars choose by
    threads: int
    median_us: float
    low_us: float  # first and
    high_us: float  # third quartile of the batches that count
    calls: int
    floor_us: float | None = None
    percent_of_floor: float | None = None  # floor / median
    percent_of_fma: float | None = None  # multiply-adds alone / peak: the floor without exponentials
    ratio_to_ours: float | None = None  # how many times as long as ours
    extra_bytes: int | None = None  # allocated through torch during the call beyond its results
    page_faults: float | None = None  # minor ones, per call
    batches: int | None = None  # each of one or several calls
    still_batches: int | None = None  # of them, in still weather (weather.py): these count
    enough_batches: int | None = None  # so many of these are wanted

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Names the measured job."""
        return self.group, self.case, self.dtype, self.direction

    @property
    def is_restless(self) -> bool:
        """Whether a busy machine left it too few batches that count."""
        wanted = self.enough_batches if self.enough_batches is not None else ENOUGH
        return self.still_batches is not None and self.still_batches < wanted

    def has(self, *tags: str) -> bool:
        return set(tags) <= set(self.tags.split())

    @classmethod
    def from_strings(cls, row: dict[str, str]) -> "Record":
        """From a row of a CSV file; an empty cell is None, as is a column that came later."""
        values = {}
        for f in fields(cls):
            if (text := row.get(f.name)) is None:
                continue  # a column that is younger than the file
            if f.type is bool or f.type is str:
                values[f.name] = text == "True" if f.type is bool else text
            elif text == "":
                values[f.name] = None
            else:
                is_whole = f.type is int or f.type == int | None
                values[f.name] = int(text) if is_whole else float(text)
        return cls(**values)


def by_case(records: Iterable[Record]) -> dict[tuple, dict[str, Record]]:
    """Key of each case -> {contender: record}, in the order of the run."""
    cases: dict[tuple, dict[str, Record]] = {}
    for record in records:
        cases.setdefault(record.key, {})[record.contender] = record
    return cases


def best_peer(contenders: dict[str, Record]) -> Record | None:
    """The fastest one that does the same job as ours."""
    peers = [record for record in contenders.values() if record.is_peer]
    return min(peers, key=lambda record: record.median_us, default=None)
