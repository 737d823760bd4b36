"""How fast the machine is at the moment: what other programs do to its cores and caches shows in no other figure."""

from collections.abc import Iterable

import torch

from .harness import Contender
from .record import Record

PROBE = "probe"
SIZE = 256  # a product of some 100 us, from the second-level cache
STILL = 0.9  # a case counts as undisturbed from this share of the run's best on


def probe_contender(threads: int) -> Contender:
    """The same product by torch for every job of a run, timed in turn with the job's contenders."""
    a, b, product = (torch.ones(SIZE, SIZE) for _ in range(3))
    return Contender(
        PROBE,
        lambda: torch.mm(a, b, out=product),
        prepare=lambda: torch.set_num_threads(threads),
        is_peer=False,
        share=0.25,
    )


def stillness(record: Record, records: Iterable[Record]) -> float | None:
    """Speed of the probe during this record's job over its best speed of the run; None without a probe."""
    if record.probe_us is None:
        return None
    return min(r.probe_us for r in records if r.probe_us is not None) / record.probe_us


def disturbed(records: list[Record]) -> set[tuple]:
    """Keys of the jobs during which the machine was slower than STILL."""
    best = min((r.probe_us for r in records if r.probe_us is not None), default=0.0)
    return {r.key for r in records if r.probe_us is not None and best < STILL * r.probe_us}
