"""Residual norms against torch's eager chain."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as torch_functional

from .. import functional as F
from .attention import contender
from .ceilings import last_level_cache
from .harness import Contender, Options
from .job import DTYPES, OURS, Floor, Job, copy_contender

EAGER = "eager"


@dataclass(frozen=True)
class Problem:
    """norm(residual + dropout(x)) of M rows of N columns."""

    M: int
    N: int
    dropout_p: float = 0.0
    return_residual: bool = False
    rms: bool = False

    def __str__(self) -> str:
        words = ["RMS" if self.rms else "LayerNorm", f"{self.M}x{self.N}"]
        words += ["dropout"] * (self.dropout_p > 0) + ["residual"] * self.return_residual
        return " ".join(words)

    def floor(self, direction: str, size: int) -> Floor:
        """Passes over M x N elements of so many bytes. Forward: x, residual, y, and the sum where it is returned.
        Backward: dy, the sum, dx, and the sum's gradient where that came; dresidual is dx again without dropout."""
        if direction == "forward":
            passes = 3 + self.return_residual
        else:
            passes = 3 + self.return_residual + (self.dropout_p > 0)
        return Floor(bytes=float(passes * self.M * self.N * size))


SHAPES = [(512, 384), (4096, 768), (8192, 1024), (16384, 4096), (65536, 1024)]


def jobs() -> Iterator[Job]:
    """LayerNorm in all forms; RMSNorm in the form that models use it in, with the residual returned."""
    for M, N in SHAPES:
        problems = [Problem(M, N, dropout_p, kept) for dropout_p in (0.0, 0.1) for kept in (False, True)]
        for problem in [*problems, Problem(M, N, return_residual=True, rms=True)]:
            for dtype in ("float32", "bfloat16"):
                for direction in ("forward", "backward"):
                    yield job(problem, dtype, direction)


def job(problem: Problem, dtype: str, direction: str) -> Job:
    """One direction of a problem."""
    size = DTYPES[dtype].itemsize
    out_of_cache = problem.M * problem.N * size >= last_level_cache()
    tags = ["norms", "memory" if out_of_cache else "cached", "dropout" if problem.dropout_p else "plain"]
    if problem.M == 512:
        tags.append("quick")

    def contenders(options: Options) -> list[Contender]:
        return make_contenders(problem, DTYPES[dtype], direction, options)

    floor = problem.floor(direction, size)
    return Job("norms", str(problem), dtype, direction, " ".join(tags), contenders, floor)


def make_contenders(p: Problem, dtype: torch.dtype, direction: str, options: Options) -> list[Contender]:
    """Ours and the eager chain on the same tensors, and a copy of as many bytes as they must move."""
    draw = torch.Generator(options.device).manual_seed(0)
    backward = direction == "backward"

    def random(*shape):
        return torch.randn(shape, generator=draw, device=options.device).to(dtype)

    x, residual = (random(p.M, p.N).requires_grad_(backward) for _ in range(2))
    weight, bias = (random(p.N).requires_grad_(backward) for _ in range(2))
    if p.rms:
        bias = None
    leaves = [t for t in (x, residual, weight, bias) if t is not None]
    calls = {OURS: _ours(p, x, residual, weight, bias), EAGER: _eager(p, x, residual, weight, bias)}
    if options.compile:
        torch.compiler.reset()  # what earlier cases left would count towards the limit of recompilations
        calls["compiled eager"] = torch.compile(calls[EAGER])
    grads = [random(p.M, p.N) for _ in range(1 + p.return_residual)]
    grads = tuple(grads) if p.return_residual else grads[0]
    made = [contender(name, call, leaves, grads, backward) for name, call in calls.items()]
    return [*made, copy_contender(p.floor(direction, dtype.itemsize).bytes, options.device)]


def _ours(p: Problem, x, residual, weight, bias) -> Callable:
    norm = F.residual_rms_norm if p.rms else F.residual_layer_norm
    options = {"dropout_p": p.dropout_p, "return_residual": p.return_residual}
    return lambda: norm(x, residual, weight, bias, **options)


def _eager(p: Problem, x, residual, weight, bias) -> Callable:
    def run():
        h = residual + (torch_functional.dropout(x, p.dropout_p) if p.dropout_p else x)
        if p.rms:
            y = torch_functional.rms_norm(h, (p.N,), weight, 1e-5)
        else:
            y = torch_functional.layer_norm(h, (p.N,), weight, bias)
        return (y, h) if p.return_residual else y

    return run
