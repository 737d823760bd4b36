"""Errors against float64, ours and torch's: speed is not bought with accuracy."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from .. import functional as F
from .. import reference

ATTENTION = (2, 4, 300, 64)
ROWS = (300, 768)


@dataclass(frozen=True)
class Errors:
    """Largest error of a result divided by the largest element of that result."""

    operation: str
    dtype: str
    result: str
    ours: float
    torch: float


def errors() -> Iterator[Errors]:
    """Output and gradients of attention (causal) and of a residual LayerNorm, for every dtype below float64."""
    operations = {
        "attention": (
            ATTENTION,
            ("query", "key", "value"),
            lambda *t: F.attention(*t, causal=True),
            lambda *t: scaled_dot_product_attention(*t, is_causal=True),
            lambda *t: reference.attention(*t, causal=True),
        ),
        "residual_layer_norm": (
            ROWS,
            ("x", "residual"),
            F.residual_layer_norm,
            lambda x, residual: layer_norm(residual + x, x.shape[-1:]),
            reference.residual_layer_norm,
        ),
    }
    for operation, (shape, names, ours, theirs, exact) in operations.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            draw = torch.Generator().manual_seed(0)
            inputs = [torch.randn(shape, generator=draw).to(dtype) for _ in names]
            grad = torch.randn(shape, generator=draw).to(dtype)
            want = _results(exact, [t.double() for t in inputs], grad.double())
            got, peer = _results(ours, inputs, grad), _results(theirs, inputs, grad)
            for n, result in enumerate(("output", *(f"grad {name}" for name in names))):
                size = want[n].abs().max()
                error, peer_error = (((r[n].double() - want[n]).abs().max() / size).item() for r in (got, peer))
                yield Errors(operation, str(dtype).removeprefix("torch."), result, error, peer_error)


def _results(operation: Callable, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = operation(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]
