"""attention_varlen: packed sequences against one attention per sequence."""

import pytest
import torch
from tolerances import DTYPES, assert_close, yardstick_dtype

from tformer_ext import functional as F
from tformer_ext import reference

Q_LENGTHS, K_LENGTHS = (5, 0, 70, 1, 33), (9, 4, 130, 0, 33)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal lower right": {"causal": "lower_right"},
    "window": {"window": (10, 3)},
    "alibi per sequence": {"alibi_slopes": torch.linspace(0.1, 1, 20).view(5, 4), "causal": "lower_right"},
    "sinks softcap": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "softcap": 2.0},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 11},
}


def bounds(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def options_of(name):
    """On the device where new tensors are."""
    device = torch.empty(0).device
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[name].items()}


def packed(dtype, requires_grad=False):
    totals = sum(Q_LENGTHS), sum(K_LENGTHS)
    shapes = (totals[0], 4, 16), (totals[1], 2, 16), (totals[1], 2, 24)
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for s in shapes]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_single_sequences(name, dtype, attention_kernels):
    qkv, options = packed(dtype), options_of(name)
    low = yardstick_dtype(dtype)
    cu = bounds(Q_LENGTHS), bounds(K_LENGTHS)
    out, lse = F.attention_varlen(*qkv, *cu, **options, return_lse=True)
    golden = reference.attention_varlen(*(t.double() for t in qkv), *cu, **options, return_lse=True)
    same = reference.attention_varlen(*(t.to(low) for t in qkv), *cu, **options, return_lse=True)
    assert_close(out, golden[0], same[0], "out")
    assert_close(lse, golden[1], same[1], "lse")


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name, attention_kernels):
    qkv, options = packed(torch.float64, requires_grad=True), options_of(name)
    cu = bounds(Q_LENGTHS), bounds(K_LENGTHS)
    cotangent = torch.randn(sum(Q_LENGTHS), 4, 24, dtype=torch.float64)
    actual = torch.autograd.grad(F.attention_varlen(*qkv, *cu, **options), qkv, cotangent)
    expected = torch.autograd.grad(reference.attention_varlen(*qkv, *cu, **options), qkv, cotangent)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_second_derivatives():
    qkv = [torch.randn(n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (5, 6, 6)]
    cu = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 6])
    options = {"causal": "lower_right", "dropout_p": 0.2, "dropout_seed": 3}
    assert torch.autograd.gradgradcheck(lambda *t: F.attention_varlen(*t, *cu, **options), qkv)


def test_no_sequences_and_int32_bounds():
    qkv = packed(torch.float32)
    start = torch.zeros(1, dtype=torch.int32)
    out = F.attention_varlen(*(t[:0] for t in qkv), start, start)
    assert out.shape == (0, 4, 24)
    long = F.attention_varlen(*qkv, bounds(Q_LENGTHS), bounds(K_LENGTHS))
    short = F.attention_varlen(*qkv, bounds(Q_LENGTHS).int(), bounds(K_LENGTHS).int())
    assert torch.equal(long, short)


def test_output_is_packed_like_the_input():
    qkv = packed(torch.float32)
    assert F.attention_varlen(*qkv, bounds(Q_LENGTHS), bounds(K_LENGTHS)).is_contiguous()
