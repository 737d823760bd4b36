"""What the machine can do at most, measured in the same run as the kernels that are compared with it."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .. import _C


@dataclass(frozen=True)
class Ceilings:
    """Peaks of all threads together."""

    dtype: str
    threads: int
    fma: float  # operations per second of multiply-adds in registers, two each, as products of this dtype use them
    exp: float  # exponentials per second, from the first-level cache, by this package's own exp
    copy: float  # bytes read and written per second by tensor.copy_, far out of cache

    def as_text(self) -> str:
        """One line for a table's title."""
        peaks = f"FMA {self.fma / 1e9:.0f} GFLOP/s, exp {self.exp / 1e9:.2f} G/s"
        return f"{self.dtype}: {peaks}, copy {self.copy / 1e9:.1f} GB/s"

    def highest(self, other: "Ceilings") -> "Ceilings":
        """The higher one of each peak."""
        higher = {peak: max(getattr(self, peak), getattr(other, peak)) for peak in ("fma", "exp", "copy")}
        return replace(self, **higher)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def measure_ceilings(dtype: torch.dtype, threads: int, seconds: float = 0.02) -> Ceilings:
    """The ceilings now, with all threads busy at the same time; takes about 5 * seconds."""
    name = str(dtype).removeprefix("torch.")
    fma, exp = (arithmetic_rate(kind, name, threads, seconds) for kind in ("fma", "exp"))
    return Ceilings(name, threads, fma, exp, copy_rate(3 * seconds))


def measure_gpu_ceilings(dtype: torch.dtype, seconds: float = 0.05) -> Ceilings:
    """The ceilings of the present GPU: what its library reaches in a large product of this dtype and in a large copy.

    Exponentials are not counted: their units are not those of the products.
    """
    size = 2048 if dtype == torch.float64 else 8192
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    fma = 2 * size**3 / _fastest(lambda: torch.mm(a, b), seconds)
    source = torch.ones(256 << 20, device="cuda", dtype=torch.uint8)
    target = torch.zeros_like(source)
    copy = 2 * source.nbytes / _fastest(lambda: target.copy_(source), seconds)
    return Ceilings(str(dtype).removeprefix("torch."), 0, fma, float("inf"), copy)


def _fastest(call: Callable[[], object], seconds: float) -> float:
    """Seconds on the GPU's clock of the fastest of several calls."""
    call()  # loads the library's kernels, which may take longer than `seconds`
    torch.cuda.synchronize()
    best, begin = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begin < seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def arithmetic_rate(kind: str, dtype: str, threads: int, seconds: float) -> float:
    """Operations per second, kind fma or exp, of so many threads at once."""
    with ThreadPoolExecutor(threads) as pool:  # the GIL is released in there
        return sum(pool.map(lambda _: _C.measure_ceiling(kind, dtype, seconds), range(threads)))


def copy_rate(seconds: float) -> float:
    """Bytes read plus bytes written per second, by torch's number of threads: the fastest of a few copies.

    The destination has been written before, so no page is mapped while the clock runs.
    """
    source, target = _copy_buffers()
    best, begin = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


_buffers: list[torch.Tensor] = []


def _copy_buffers() -> list[torch.Tensor]:
    """Two buffers, each four times the last-level cache, mapped once for the whole run."""
    if not _buffers:
        count = min(4 * max(32 << 20, last_level_cache()), 512 << 20) // 4
        _buffers.extend([torch.ones(count), torch.zeros(count)])
    return _buffers


def gemm_rate(dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Operations per second of the fastest torch.mm over a few sizes that fit in cache: what a library reaches."""
    best = 0.0
    for size in (256, 512, 1024):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        torch.mm(a, b)
        begin = time.perf_counter()
        while True:
            start = time.perf_counter()
            torch.mm(a, b)
            now = time.perf_counter()
            best = max(best, 2 * size**3 / (now - start))
            if now - begin > seconds / 3:
                break
    return best


def last_level_cache() -> int:
    """Bytes of the largest data cache that this process sees, 32 MiB where the system does not tell."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=32 << 20)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
