"""torch.nn.TransformerEncoderLayer against ours: training steps with dropout, and eval."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .. import modules
from .harness import Contender, Options
from .job import DTYPES, OURS, Job

STOCK = "torch.nn"
COMPILED = "compiled torch.nn"


@dataclass(frozen=True)
class Problem:
    """One layer, post-norm with ReLU unless told otherwise. padding: share of the last batch entry that is padding."""

    B: int
    S: int
    d_model: int
    heads: int
    feedforward: int
    padding: float = 0.0
    causal: bool = False
    norm_first: bool = False
    activation: str = "relu"

    def __str__(self) -> str:
        words = [f"B{self.B} S{self.S} d{self.d_model} H{self.heads} ff{self.feedforward}"]
        words += ["padding"] * (self.padding > 0) + ["causal"] * self.causal
        words += ["pre-norm"] * self.norm_first + ["gelu"] * (self.activation == "gelu")
        return " ".join(words)

    def masks(self) -> dict:
        """Arguments of forward, as a user of torch.nn gives them."""
        found = {}
        if self.padding:
            lengths = (self.S * (1 - torch.linspace(0, self.padding, self.B))).round().long()
            found["src_key_padding_mask"] = torch.arange(self.S) >= lengths.view(-1, 1)
        if self.causal:
            found["src_mask"] = torch.ones(self.S, self.S, dtype=torch.bool).triu(1)
            found["is_causal"] = True
        return found


SIZES = [(8, 128, 768, 12, 3072), (4, 512, 512, 8, 2048)]


def jobs() -> Iterator[Job]:
    """Each size plain, with padding and causal; the other forms of a layer in one size."""
    for size in SIZES:
        problems = [Problem(*size), Problem(*size, padding=0.5), Problem(*size, causal=True)]
        if size is SIZES[0]:
            problems += [Problem(*size, norm_first=True), Problem(*size, activation="gelu")]
        for problem in problems:
            for dtype in ("float32", "bfloat16"):
                for mode in ("training", "eval"):
                    yield _job(problem, dtype, mode)


def _job(problem: Problem, dtype: str, mode: str) -> Job:
    def contenders(options: Options) -> list[Contender]:
        return make_contenders(problem, DTYPES[dtype], mode, options)

    return Job("modules", str(problem), dtype, mode, "modules", contenders)


def make_contenders(
    p: Problem, dtype: torch.dtype, mode: str, options: Options, dropout: float = 0.1
) -> list[Contender]:
    """Ours and torch's with the same weights on the same input; training is forward and backward."""
    arguments = (p.d_model, p.heads, p.feedforward, dropout, p.activation)
    stock = nn.TransformerEncoderLayer(*arguments, batch_first=True, norm_first=p.norm_first, dtype=dtype)
    ours = modules.TransformerEncoderLayer(*arguments, batch_first=True, norm_first=p.norm_first, dtype=dtype)
    ours.load_state_dict(stock.state_dict())
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(p.B, p.S, p.d_model, generator=draw).to(dtype) for _ in range(2))
    layers = {OURS: ours, STOCK: stock}
    if options.compile:
        layers[COMPILED] = torch.compile(stock)
    made = []
    for name, layer in layers.items():
        run = _training(layer, x, grad, p.masks()) if mode == "training" else _eval(layer, x, p.masks())
        made.append(Contender(name, run, compiles=name == COMPILED))
    return made


def _training(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor, masks: dict) -> Callable:
    layer.train()
    x = x.clone().requires_grad_()
    leaves = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x, **masks), leaves, grad)


def _eval(layer: nn.Module, x: torch.Tensor, masks: dict) -> Callable:
    layer.eval()

    def run():
        with torch.no_grad():
            return layer(x, **masks)

    return run
