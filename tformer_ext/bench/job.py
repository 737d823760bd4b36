"""What a benchmark is made of: a job has contenders, a floor, and becomes one record per contender."""

import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from .ceilings import Ceilings, measure_ceilings, measure_gpu_ceilings
from .harness import Contender, Options, Timing, measure
from .record import Record
from .weather import Weather

OURS = "ours"  # the first contender of every job
COPY = "copy"  # a contender that only moves as many bytes as the floor of its job
FAR = 3.0  # times ours: of a lasting peer so far behind one call tells enough
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Floor:
    """What cannot be avoided: operations of multiply-adds (two each), exponentials, bytes read or written."""

    fma: float = 0.0
    exp: float = 0.0
    bytes: float = 0.0

    def seconds(self, ceilings: Ceilings, copied: float | None = None) -> float:
        """Arithmetic and memory traffic cannot overlap better than completely: the longer of the two.

        copied: seconds that a copy of as many bytes took, in turn with the contenders; else the copy ceiling counts.
        """
        moved = self.bytes / ceilings.copy if copied is None else copied
        return max(self.fma / ceilings.fma + self.exp / ceilings.exp, moved)


def copy_contender(total_bytes: float, device: str) -> Contender:
    """Reads half of so many bytes and writes the other half: what the floor of a job that moves them is made of.

    Of the job's own size, so that caches help both alike.
    """
    source, target = (torch.ones(max(1, int(total_bytes) // 8), device=device) for _ in range(2))
    return Contender(COPY, lambda: target.copy_(source), is_peer=False)


@dataclass(frozen=True)
class Job:
    """One case of a group in one dtype and direction. `contenders` makes them when their turn comes, ours first."""

    group: str
    case: str
    dtype: str
    direction: str
    tags: str
    contenders: Callable[[Options], list[Contender]]
    floor: Floor | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """That of its records."""
        return self.group, self.case, self.dtype, self.direction

    @property
    def name(self) -> str:
        return "/".join(self.key)

    def measure(self, options: Options, without: Collection[str] = ()) -> "Measurement":
        """Ceilings are measured right before, so that they meet the machine in the same state. without: contenders."""
        ceilings = None
        if self.floor:
            dtype = DTYPES[self.dtype]
            on_gpu = options.device == "cuda"
            ceilings = measure_gpu_ceilings(dtype) if on_gpu else measure_ceilings(dtype, options.threads)
        contenders = [c for c in self.contenders(options) if c.name not in without]
        timings = measure(contenders, options)
        peers = {c.name for c in contenders if c.is_peer and c.name != OURS}
        return Measurement(self, options.threads, timings, peers, ceilings)


@dataclass
class Measurement:
    """What has been measured for a job so far, by name of the contender."""

    job: Job
    threads: int
    timings: dict[str, Timing]
    peers: set[str]
    ceilings: Ceilings | None

    def extend(self, later: "Measurement") -> None:
        """Adds what was measured later. The ceilings are the highest seen: a busy machine only lowers them."""
        for name, timing in later.timings.items():
            self.timings[name].extend(timing)
        if self.ceilings:
            self.ceilings = self.ceilings.highest(later.ceilings)

    def far_behind(self) -> set[str]:
        """Contenders that are not measured on: one call may take longer than all that a case needs otherwise."""
        ours = self.timings[OURS].batches[0].seconds
        return {n for n, timing in self.timings.items() if timing.lasting and timing.batches[0].seconds > FAR * ours}

    def is_still(self, weather: Weather) -> bool:
        """Whether enough batches of each contender that is measured on were in still weather."""
        far = self.far_behind()
        return all(timing.still(weather) >= timing.enough for n, timing in self.timings.items() if n not in far)

    def records(self, weather: Weather) -> list[Record]:
        """One for each contender."""
        counted = {name: timing.seconds(weather) for name, timing in self.timings.items()}
        medians = {name: statistics.median(seconds) for name, seconds in counted.items()}
        return [self._record(name, counted, medians, weather) for name in self.timings]

    def _record(self, name: str, counted: dict[str, list[float]], medians: dict[str, float], weather) -> Record:
        job, timing, seconds, median = self.job, self.timings[name], counted[name], medians[name]
        record = Record(
            group=job.group,
            case=job.case,
            dtype=job.dtype,
            direction=job.direction,
            contender=name,
            is_peer=name in self.peers,
            tags=job.tags,
            threads=self.threads,
            median_us=1e6 * median,
            low_us=1e6 * seconds[len(seconds) // 4],
            high_us=1e6 * seconds[3 * len(seconds) // 4],
            calls=timing.calls,
            ratio_to_ours=median / medians[OURS],
            extra_bytes=timing.extra_bytes,
            page_faults=timing.page_faults / timing.calls,
            batches=len(timing.batches),
            still_batches=timing.still(weather),
            enough_batches=timing.enough,
        )
        if job.floor:
            record.floor_us = 1e6 * job.floor.seconds(self.ceilings, medians.get(COPY))
            record.percent_of_floor = 100 * record.floor_us / record.median_us
            if job.floor.fma:
                record.percent_of_fma = 1e8 * job.floor.fma / self.ceilings.fma / record.median_us
        return record
