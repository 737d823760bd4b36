"""Dropout past torch's own on a CPU, which draws its random numbers one after the other.

Those of the residual norm come from counters, in vectors. Everything that is no plain tensor on a CPU (subclasses,
tracing, transforms, derivatives in forward mode, dispatch modes) goes to torch.
"""

import math

import torch
from torch import nn

from ..arguments import DTYPES
from ..ops.recording import call, call_backward, is_plain_cpu_tensor, needs_function
from .plain import is_plain

_residual_norm = torch.ops.tformer_ext._residual_norm_forward.default
_LEAST_DRAWN = 5000  # elements: with fewer, drawing a seed and calling the kernel take longer than torch's draws
_COLUMNS_OF_COUNTERS = 64  # served by the counters that are drawn at once, also in rows that are shorter
_LEAST_COLUMNS = 32  # shorter rows would waste most of those
_MOST_COLUMNS = 1 << 14  # of a row, of which each thread keeps several in working memory
_COMMON_COLUMNS = 1 << 10  # the widest row that x is cut into


def add_dropout(x, dropout, residual=None):
    """residual + dropout(x); dropout may be any module or None, residual None."""
    if dropout is not None:
        if not is_plain_dropout(dropout):
            x = dropout(x)
        elif dropout.training:
            return drop(x, dropout.p, residual)
    return x if residual is None else residual + x


def drop(x, p, residual=None):
    """residual + torch.nn.functional.dropout(x, p); residual may be None."""
    columns = _columns_to_draw(x, residual) if 0 < p <= 1 else 0
    if not columns:
        x = nn.functional.dropout(x, p)
        return x if residual is None else residual + x
    seed = torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu")
    operands = x, residual
    if columns != x.shape[-1]:  # not within the Function: what is a view there is not to be modified in place
        operands = [None if t is None else t.view(-1, columns) for t in operands]
    y = call(_AddDropout, *operands, seed, p) if needs_function(*operands) else _AddDropout.forward(*operands, seed, p)
    return y if columns == x.shape[-1] else y.view(x.shape)


class Dropout(nn.Dropout):
    """torch.nn.Dropout: same constructor and forward, in any dtype and on any device.

    On a CPU the mask of some thousand elements or more comes from counters, and backward keeps a seed instead of it.
    Such calls drop other elements than torch's under the same seed, with the same probability, taken as a multiple of
    2**-16. All else is torch's: small or strided inputs, rows that fit no counters, inplace=True.

    input: any shape; returns the same shape and dtype.
    """

    def forward(self, input):
        return super().forward(input) if self.inplace or not self.training else drop(input, self.p)


def is_plain_dropout(module):
    """Whether module does what torch.nn.Dropout does and nothing else."""
    kind = type(module)
    return kind in (nn.Dropout, Dropout) and is_plain(module, kind)


def _columns_to_draw(x, residual):
    """The width of the rows in which x is taken, 0 if that is for torch to drop.

    That of x itself where it is not too short for the counters, or else a divisor of the number of all elements.
    """
    if not is_plain_cpu_tensor(x) or x.numel() < _LEAST_DRAWN or x.dtype not in DTYPES or not x.is_contiguous():
        return 0
    if residual is not None and not (
        is_plain_cpu_tensor(residual)
        and residual.dtype == x.dtype
        and residual.shape == x.shape
        and residual.is_contiguous()
    ):
        return 0
    columns = x.shape[-1] if x.shape[-1] <= _MOST_COLUMNS else 0
    if columns < _COLUMNS_OF_COUNTERS:
        columns = max(columns, math.gcd(x.numel(), _COMMON_COLUMNS))
    return columns if columns >= _LEAST_COLUMNS else 0


class _AddDropout(torch.autograd.Function):
    """The sum that the residual norm makes before it normalises; what else it writes costs less than torch's draws."""

    @staticmethod
    def forward(x, residual, seed, dropout_p):
        return _residual_norm(x, residual, None, None, seed, 1e-5, dropout_p, True, True, None)[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])
        ctx.dropout_p = inputs[3]

    @staticmethod
    def backward(ctx, grad):
        (seed,) = ctx.saved_tensors
        wants_x, wants_residual, *_ = ctx.needs_input_grad
        grad_x = call_backward(_AddDropout, grad.contiguous(), None, seed, ctx.dropout_p) if wants_x else None
        return grad_x, grad if wants_residual else None, None, None
