"""Derivatives in forward mode: torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck

import tformer_ext as tx
from tformer_ext import functional as F
from tformer_ext import reference

D = torch.float64
LENGTHS = torch.tensor([5, 0], dtype=torch.int32)
OPTIONS = {
    "plain": {},
    "causal window": {"causal": "lower_right", "window": (2, 0)},
    "mask": {"mask": torch.ones(7, 9, dtype=torch.bool).tril()},
    "lengths": {"key_lengths": LENGTHS},
    "alibi softcap": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.3, 0.2]), "softcap": 3.0},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 5},
}


def qkv():
    return [torch.randn(shape, dtype=D) for shape in ((2, 4, 7, 6), (2, 2, 9, 6), (2, 2, 9, 5))]


@pytest.mark.parametrize("option", OPTIONS)
def test_attention_against_differences(option):
    """The differences are those of the kernels; lse of a row that sees nothing is no number."""
    bias, sinks = torch.randn(1, 4, 7, 9, dtype=D), torch.randn(4, dtype=D)
    leaves = [t.requires_grad_() for t in (*qkv(), bias, sinks)]

    def function(q, k, v, bias, sinks):
        out, lse = F.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **OPTIONS[option])
        return out, torch.where(lse == -torch.inf, 0, lse)

    assert gradcheck(function, leaves, check_forward_ad=True, check_backward_ad=False)


def test_several_blocks_of_rows():
    q, k, v = torch.randn(1, 2, 300, 8), torch.randn(1, 2, 310, 8), torch.randn(1, 2, 310, 8)
    bias = torch.randn(2, 300, 310)
    tangents = tuple(torch.randn_like(t) for t in (q, k, v, bias))

    def run(attention):
        return torch.func.jvp(lambda q, k, v, b: attention(q, k, v, bias=b, causal=True), (q, k, v, bias), tangents)

    torch.testing.assert_close(run(F.attention), run(reference.attention))


def test_packed_sequences_against_differences():
    q, k, v = (torch.randn(9, 2, 4, dtype=D, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32)

    def function(q, k, v):
        return F.attention_varlen(q, k, v, bounds, bounds, causal=True)

    assert gradcheck(function, (q, k, v), check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("norm", [F.residual_layer_norm, F.residual_rms_norm])
def test_norms_against_differences(norm, dropout_p):
    x, residual = (torch.randn(3, 4, 10, dtype=D, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(10, dtype=D, requires_grad=True) for _ in range(2))

    def function(*leaves):
        return norm(*leaves, dropout_p=dropout_p, dropout_seed=3 if dropout_p else None, return_residual=True)

    assert gradcheck(function, (x, residual, weight, bias), check_forward_ad=True, check_backward_ad=False)


def test_matrices_of_derivatives():
    """jacfwd, and the hessian, which is forward mode of reverse mode."""
    q, k, v = (torch.randn(1, 1, 3, 4, dtype=D) for _ in range(3))

    def through(attention):
        return lambda q, k, v: attention(q, k, v, causal=True).sin().sum()

    for transform in (torch.func.jacfwd, torch.func.hessian):
        actual, expected = (
            transform(through(f), argnums=(0, 1, 2))(q, k, v) for f in (F.attention, reference.attention)
        )
        torch.testing.assert_close(actual, expected)


def test_dual_numbers_of_some_operands_and_none():
    q, k, v = (t.float() for t in qkv())
    with forward_ad.dual_level():
        out, lse = F.attention(q, forward_ad.make_dual(k, torch.ones_like(k)), v, return_lse=True)
        assert forward_ad.unpack_dual(out).tangent is not None and forward_ad.unpack_dual(lse).tangent is not None
        plain = F.attention(q, k, v)
        assert forward_ad.unpack_dual(plain).tangent is None
        empty = F.attention(q[:, :, :0], forward_ad.make_dual(k, torch.ones_like(k)), v)
        assert empty.shape == (2, 4, 0, 5)
    torch.testing.assert_close(plain, F.attention(q, k, v))


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_layer_as_torchs(norm_first):
    torch_layer = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=norm_first, dtype=D)
    layer = tx.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=norm_first, dtype=D)
    layer.load_state_dict(torch_layer.state_dict())
    x, tangent = torch.randn(2, 5, 16, dtype=D), torch.randn(2, 5, 16, dtype=D)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.func.jvp(torch_layer, (x,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,)), expected)
