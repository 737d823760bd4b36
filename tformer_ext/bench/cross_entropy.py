"""The loss of a language model's logits, and that of the layer which makes them, ours against what torch's users and
transformers call."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as torch_functional

from .. import functional as F
from .attention import contender
from .harness import Contender, Options
from .job import DTYPES, OURS, Floor, Job, copy_contender

STOCK = "torch"


K = 768  # columns of the layers


@dataclass(frozen=True)
class Problem:
    """M rows of N logits."""

    M: int
    N: int

    def __str__(self) -> str:
        return f"{self.M}x{self.N}"

    def floor_of_products(self, mode: str) -> Floor:
        """Logits are made; in training both their gradients are multiplied."""
        return Floor(fma=2.0 * self.M * K * self.N * (3 if mode == "training" else 1))

    def floor(self, direction: str, size: int) -> Floor:
        """Logits are read, and backward a gradient of their size is written."""
        return Floor(bytes=float((1 + (direction == "backward")) * self.M * self.N * size))


def jobs() -> Iterator[Job]:
    """1024 tokens and the vocabularies of GPT-2 and Llama 2; one sentence and that of BERT."""
    for problem in (Problem(1024, 50257), Problem(1024, 32000), Problem(64, 30522)):
        for dtype in ("float32", "bfloat16"):
            for direction in ("forward", "backward"):
                yield job(problem, dtype, direction)
            for mode in ("training", "eval"):
                yield linear_job(problem, dtype, mode)


def job(problem: Problem, dtype: str, direction: str) -> Job:
    """One direction of a problem."""

    def contenders(_options: Options) -> list[Contender]:
        return make_contenders(problem, DTYPES[dtype], direction)

    floor = problem.floor(direction, DTYPES[dtype].itemsize)
    return Job("cross_entropy", str(problem), dtype, direction, "memory", contenders, floor)


def linear_job(problem: Problem, dtype: str, mode: str) -> Job:
    """The loss of a linear layer's results: training is forward and backward, eval forward without gradients."""

    def contenders(_options: Options) -> list[Contender]:
        return make_linear_contenders(problem, DTYPES[dtype], mode)

    case, floor = f"{problem.M}x{K}x{problem.N}", problem.floor_of_products(mode)
    return Job("linear_cross_entropy", case, dtype, mode, "compute", contenders, floor)


def make_linear_contenders(p: Problem, dtype: torch.dtype, mode: str) -> list[Contender]:
    """torch's two functions, as its own linear_cross_entropy calls them unless it is given options."""
    x, weight = torch.randn(p.M, K).to(dtype), (torch.randn(p.N, K) / K**0.5).to(dtype)
    target = torch.randint(0, p.N, (p.M,))
    leaves = [t.requires_grad_(mode == "training") for t in (x, weight)]

    def run(function: Callable) -> Callable:
        def call():
            loss = function()
            return torch.autograd.grad(loss, leaves) if mode == "training" else loss

        return call

    calls = {
        OURS: lambda: F.linear_cross_entropy(x, weight, target),
        STOCK: lambda: torch_functional.cross_entropy(torch_functional.linear(x, weight), target),
    }
    return [Contender(name, run(function)) for name, function in calls.items()]


def make_contenders(p: Problem, dtype: torch.dtype, direction: str) -> list[Contender]:
    """The mean. torch's of float32, to which 16-bit logits are widened, as transformers does it; ours of logits as they
    are, whose loss is rounded to their dtype in the end."""
    backward = direction == "backward"
    logits = (3 * torch.randn(p.M, p.N)).to(dtype).requires_grad_(backward)
    target = torch.randint(0, p.N, (p.M,))
    calls: dict[str, Callable] = {
        OURS: lambda: F.cross_entropy(logits, target),
        STOCK: lambda: torch_functional.cross_entropy(logits.float(), target).to(dtype),
    }
    grad = torch.ones((), dtype=dtype)
    made = [contender(name, call, [logits], grad, backward) for name, call in calls.items()]
    return [*made, copy_contender(p.floor(direction, dtype.itemsize).bytes, "cpu")]
