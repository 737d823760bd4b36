"""First and second derivatives of the public functions by finite differences, in float64."""

import pytest
import torch

from tformer_ext import functional as F

OPTIONS = {
    "plain": {},
    "causal window": {"causal": "lower_right", "window": (2, -1)},
    "softcap dropout": {"softcap": 2.0, "dropout_p": 0.3, "dropout_seed": 4},
    "alibi lengths": {"alibi_slopes": torch.tensor([0.1, 0.5]), "key_lengths": torch.tensor([6, 3])},
    "mask with dead row": {"mask": torch.arange(30).view(1, 1, 5, 6) > 7},
}
BIAS_SHAPES = [(2, 2, 5, 6), (1, 2, 5, 6), (2, 1, 1, 6), (5, 1), (1, 2, 1, 1)]


def leaves(*shapes):
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("name", OPTIONS)
def test_attention(name):
    inputs = leaves((2, 2, 5, 4), (2, 1, 6, 4), (2, 1, 6, 3))

    def run(q, k, v):
        out, lse = F.attention(q, k, v, **OPTIONS[name], return_lse=True)
        return out, torch.where(lse == -torch.inf, 0, lse)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_bias_and_sinks(shape):
    inputs = leaves((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 3), shape, (2,))

    def run(q, k, v, bias, sinks):
        return F.attention(q, k, v, bias=bias, sinks=sinks, causal=True)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_only_the_bias_wants_a_gradient():
    q, k, v, bias = leaves((1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 6, 3), (1, 2, 5, 6))
    assert torch.autograd.gradcheck(lambda b: F.attention(q.detach(), k.detach(), v.detach(), bias=b), (bias,))


def test_second_derivative_over_several_row_blocks():
    inputs = [t[:, :, :, :2].detach().requires_grad_() for t in leaves((1, 1, 140, 3), (1, 1, 3, 3), (1, 1, 3, 3))]
    assert torch.autograd.gradgradcheck(lambda *t: F.attention(*t).sum(2), inputs)


@pytest.mark.parametrize("function", [F.residual_layer_norm, F.residual_rms_norm])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("return_residual", [False, True])
def test_norms(function, dropout_p, return_residual):
    inputs = leaves((4, 7), (4, 7), (7,), (7,))

    def run(*tensors):
        return function(*tensors, dropout_p=dropout_p, dropout_seed=6, return_residual=return_residual)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("function", [F.residual_layer_norm, F.residual_rms_norm])
def test_norms_alone(function):
    x, weight = leaves((3, 2, 5), (2, 5))
    assert torch.autograd.gradcheck(lambda x, w: function(x, None, w), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x: function(x), (x,))
