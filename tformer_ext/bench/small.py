"""Tiny calls, where only the overhead of a call counts, and how work scales with threads."""

from collections.abc import Iterator

import torch
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from .. import functional as F
from .attention import Problem, make_contenders
from .harness import Contender, Options
from .job import DTYPES, OURS, Job

TINY_ATTENTION, TINY_ROWS = (1, 1, 8, 16), (8, 64)


def overhead_jobs() -> Iterator[Job]:
    """forward: without a gradient; backward: forward and backward of a training step."""
    for direction in ("forward", "backward"):
        yield Job("overhead", "attention", "float32", direction, "quick", _attention(direction))
        yield Job("overhead", "layer_norm", "float32", direction, "quick", _layer_norm(direction))


def _step(call, leaves, direction):
    if direction == "backward":
        return lambda: torch.autograd.grad(call().sum(), leaves)

    def run():
        with torch.no_grad():
            return call()

    return run


def _attention(direction: str):
    def contenders(_options: Options) -> list[Contender]:
        qkv = [torch.randn(TINY_ATTENTION, requires_grad=direction == "backward") for _ in range(3)]
        return [
            Contender(OURS, _step(lambda: F.attention(*qkv), qkv, direction)),
            Contender("torch SDPA", _step(lambda: scaled_dot_product_attention(*qkv), qkv, direction)),
        ]

    return contenders


def _layer_norm(direction: str):
    """Without a residual, so that torch's layer_norm does the same job in one call."""

    def contenders(_options: Options) -> list[Contender]:
        needed = direction == "backward"
        x, weight, bias = (torch.randn(shape, requires_grad=needed) for shape in (TINY_ROWS, (64,), (64,)))
        leaves = [x, weight, bias]
        return [
            Contender(OURS, _step(lambda: F.residual_layer_norm(x, None, weight, bias), leaves, direction)),
            Contender("torch layer_norm", _step(lambda: layer_norm(x, (64,), weight, bias), leaves, direction)),
        ]

    return contenders


def scaling_jobs() -> Iterator[Job]:
    """Ours with all threads against ours with one."""
    for problem in (Problem(8, 12, 128, 64), Problem(1, 12, 2048, 64), Problem(1, 12, 2048, 64, causal=True)):
        for dtype in ("float32", "bfloat16"):
            for direction in ("forward", "backward"):
                yield Job("scaling", str(problem), dtype, direction, "", _threads(problem, dtype, direction))


def _threads(problem: Problem, dtype: str, direction: str):
    def contenders(options: Options) -> list[Contender]:
        ours = make_contenders(problem, DTYPES[dtype], direction, options)[0]

        def prepare(threads: int) -> None:
            torch.set_num_threads(threads)
            if ours.prepare is not None:
                ours.prepare()

        return [
            Contender(name, ours.call, prepare=lambda n=n: prepare(n), is_peer=False)
            for name, n in ((OURS, options.threads), ("one thread", 1))
        ]

    return contenders
