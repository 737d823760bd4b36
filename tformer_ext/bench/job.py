"""What a benchmark is made of: a job has contenders, a floor, and becomes one record per contender."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .ceilings import Ceilings, measure_ceilings, measure_gpu_ceilings
from .harness import Contender, Options, Timing, measure
from .record import Record
from .weather import PROBE, probe_contender

OURS = "ours"  # the first contender of every job
COPY = "copy"  # a contender that only moves as many bytes as the floor of its job
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

    def run(self, options: Options) -> Iterator[Record]:
        """Ceilings are measured right before, so that they meet the machine in the same state."""
        ceilings = None
        if self.floor:
            dtype = DTYPES[self.dtype]
            on_gpu = options.device == "cuda"
            ceilings = measure_gpu_ceilings(dtype) if on_gpu else measure_ceilings(dtype, options.threads)
        contenders = self.contenders(options)
        probe = [] if options.device == "cuda" else [probe_contender(options.threads)]
        timings = measure(contenders + probe, options)
        for contender in contenders:
            if contender.name in timings:
                yield self._record(contender, timings, ceilings, options)

    def _record(self, contender: Contender, timings: dict[str, Timing], ceilings, options: Options) -> Record:
        timing = timings[contender.name]
        record = Record(
            group=self.group,
            case=self.case,
            dtype=self.dtype,
            direction=self.direction,
            contender=contender.name,
            is_peer=contender.is_peer and contender.name != OURS,
            tags=self.tags,
            threads=options.threads,
            median_us=1e6 * timing.median,
            low_us=1e6 * timing.quantile(0.25),
            high_us=1e6 * timing.quantile(0.75),
            calls=timing.calls,
            ratio_to_ours=timing.median / timings[OURS].median,
            extra_bytes=timing.extra_bytes,
            page_faults=timing.page_faults,
            probe_us=1e6 * timings[PROBE].median if PROBE in timings else None,
        )
        if self.floor:
            copied = timings[COPY].median if COPY in timings else None
            record.floor_us = 1e6 * self.floor.seconds(ceilings, copied)
            record.percent_of_floor = 100 * record.floor_us / record.median_us
            if self.floor.fma:
                record.percent_of_fma = 1e8 * self.floor.fma / ceilings.fma / record.median_us
        return record
