"""The loss of a language model's logits, ours against what torch's users and transformers call."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as torch_functional

from .. import functional as F
from .attention import contender
from .harness import Contender, Options
from .job import DTYPES, OURS, Floor, Job, copy_contender

STOCK = "torch"


@dataclass(frozen=True)
class Problem:
    """M rows of N logits."""

    M: int
    N: int

    def __str__(self) -> str:
        return f"{self.M}x{self.N}"

    def floor(self, direction: str, size: int) -> Floor:
        """Logits are read, and backward a gradient of their size is written."""
        return Floor(bytes=float((1 + (direction == "backward")) * self.M * self.N * size))


def jobs() -> Iterator[Job]:
    """1024 tokens and the vocabularies of GPT-2 and Llama 2; one sentence and that of BERT."""
    for problem in (Problem(1024, 50257), Problem(1024, 32000), Problem(64, 30522)):
        for dtype in ("float32", "bfloat16"):
            for direction in ("forward", "backward"):
                yield job(problem, dtype, direction)


def job(problem: Problem, dtype: str, direction: str) -> Job:
    """One direction of a problem."""

    def contenders(_options: Options) -> list[Contender]:
        return make_contenders(problem, DTYPES[dtype], direction)

    floor = problem.floor(direction, DTYPES[dtype].itemsize)
    return Job("cross_entropy", str(problem), dtype, direction, "memory", contenders, floor)


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
