"""Pairs of our and torch's Transformer modules, and the masks they are compared with."""

import contextlib

import torch
from torch import nn

import tformer_ext as tx

E, H, FF, N, S, T = 8, 2, 16, 3, 5, 7
PADDING = torch.arange(S) >= torch.tensor([5, 3, 4])[:, None]  # (N, S), True = padding
LEFT_PADDING = PADDING.flip(1)


def pair(name, *args, seed=3, dtype=torch.float64, **options):
    """(ours, torch's) module of that name, made with the same arguments after the same seed."""
    made = []
    for package in (tx, nn):
        torch.manual_seed(seed)
        made.append(getattr(package, name)(*args, dtype=dtype, **options))
    return made


def layer_pair(name="TransformerEncoderLayer", dropout=0.0, **options):
    return pair(name, E, H, FF, dropout, **options)


def sequence(length=S, batch_first=True, dtype=torch.float64):
    t = torch.randn(N, length, E, dtype=dtype)
    return t if batch_first else t.transpose(0, 1).contiguous()


def attention_mask(kind, L=S, S=S, dtype=torch.float64):
    """(L, S) or (N * H, L, S) as torch.nn takes them, no row fully masked: there torch may give NaN."""
    if kind is None:
        return None
    if kind == "causal float":
        return nn.Transformer.generate_square_subsequent_mask(L, dtype=dtype)
    if kind == "causal bool":
        return torch.ones(L, S, dtype=torch.bool).triu(1)
    shape = (N * H, L, S) if "3d" in kind else (L, S)
    if "float" in kind:
        return torch.randn(shape, dtype=dtype)
    mask = torch.rand(shape) > 0.6
    mask[..., 0] = False
    return mask


MASKS = [None, "bool", "float", "bool 3d", "float 3d", "causal float", "causal bool"]


def padding_mask(kind, hidden=PADDING, dtype=torch.float64):
    if kind is None:
        return None
    return hidden if kind == "bool" else torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)


def results(module, inputs, call):
    """Output of call(module, *inputs), and the gradients of its inputs and of all parameters."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = call(module, *inputs)
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in inputs), *(p.grad for p in module.parameters())]


@contextlib.contextmanager
def no_fast_path():
    """torch's fast path takes a floating mask for a bool one and the tanh GELU for the exact one."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def compare(ours, stock, inputs, call):
    """Same output and gradients, and the same output without gradients."""
    for a, b in zip(*(results(module, inputs, call) for module in (ours, stock)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad(), no_fast_path():
        torch.testing.assert_close(call(ours, *inputs), call(stock, *inputs))
