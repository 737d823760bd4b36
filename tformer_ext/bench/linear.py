"""Linear layers of a few rows, as decoding has them, with weights that come from memory: ours against torch's."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as torch_functional

from ..modules.linear import linear
from .ceilings import last_level_cache
from .harness import Contender, Options
from .job import DTYPES, OURS, Floor, Job

STOCK = "torch"


@dataclass(frozen=True)
class Problem:
    """M rows of K columns times weights for N columns, which lie as (N, K), or as (K, N): GPT-2's Conv1D."""

    M: int
    K: int
    N: int
    transposed: bool = False

    def __str__(self) -> str:
        return f"{self.M}x{self.K} to {self.N}" + " transposed" * self.transposed


def jobs() -> Iterator[Job]:
    """One row and eight, both ways to store weights."""
    for K, N in ((768, 2304), (3072, 768), (4096, 4096)):
        for transposed in (False, True):
            for dtype in ("float32", "bfloat16"):
                for M in (1, 8):
                    yield job(Problem(M, K, N, transposed), dtype)


def job(p: Problem, dtype: str) -> Job:
    """Without a gradient."""

    def contenders(_options: Options) -> list[Contender]:
        return make_contenders(p, DTYPES[dtype])

    floor = Floor(bytes=float(p.K * p.N * DTYPES[dtype].itemsize))
    return Job("linear", str(p), dtype, "forward", "memory", contenders, floor)


def make_contenders(p: Problem, dtype: torch.dtype) -> list[Contender]:
    """Both go through the same weights, several times the last cache, a layer each call."""
    layers = 1 + 4 * last_level_cache() // (p.K * p.N * dtype.itemsize)
    shape = (p.K, p.N) if p.transposed else (p.N, p.K)
    weights = [torch.randn(shape).to(dtype) for _ in range(layers)]
    weights = [w.t() if p.transposed else w for w in weights]
    x, bias = torch.randn(p.M, p.K).to(dtype), torch.randn(p.N).to(dtype)

    def contender(name: str, function) -> Contender:
        turn = itertools.cycle(weights)

        def run():
            with torch.no_grad():
                return function(x, next(turn), bias)

        return Contender(name, run)

    return [contender(OURS, linear), contender(STOCK, torch_functional.linear)]
