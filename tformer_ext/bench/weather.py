"""How fast the machine is at the moment: what other programs do to its cores and caches shows in no other figure."""

import bisect
import time
from dataclasses import dataclass

import torch

SIZE = 192  # a product of some 100 us, from the second-level cache
STILL = 0.9  # a moment counts as undisturbed from this share of the usual best speed on
ENOUGH = 5  # batches that a median is taken of where the machine was too busy for more
BEST = 0.01  # the share of a run's probes that are faster than its usual best: the very fastest one is an accident


@dataclass(frozen=True)
class Probe:
    """The time that the product took with so many threads."""

    threads: int
    seconds: float


class Weather:
    """Times the same product by torch again and again, all through a run."""

    def __init__(self):
        self._tensors = [torch.ones(SIZE, SIZE) for _ in range(3)]
        self._seconds: dict[int, list[float]] = {}  # of each number of threads, in ascending order

    def probe(self) -> Probe:
        """With torch's present number of threads. A first product, not timed, fetches what was pushed out of the caches
        since the last probe: that takes as long again, and says nothing of other programs."""
        a, b, product = self._tensors
        torch.mm(a, b, out=product)
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        return self.add(torch.get_num_threads(), time.perf_counter() - start)

    def add(self, threads: int, seconds: float) -> Probe:
        """Takes note of a product's time."""
        bisect.insort(self._seconds.setdefault(threads, []), seconds)
        return Probe(threads, seconds)

    def speed(self, probe: Probe) -> float:
        """Over the usual best of the run so far with as many threads."""
        ordered = self._seconds[probe.threads]
        return ordered[int(BEST * len(ordered))] / probe.seconds
