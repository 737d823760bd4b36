"""functional.scaled_dot_product_attention against torch's, over its arguments."""

import pytest
import torch

from tformer_ext import functional as F

torch_sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "scale", "row mask"])
def test_agrees(lead, kind):
    q, k, v = (torch.randn(*lead, n, d, dtype=torch.float64) for n, d in ((5, 8), (7, 8), (7, 6)))
    options = {
        "plain": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": torch.rand(*lead, 5, 7) > 0.3},
        "float": {"attn_mask": torch.randn(5, 7, dtype=torch.float64)},
        "scale": {"scale": 0.7},
        "row mask": {"attn_mask": torch.rand(1, 7) > 0.3},
    }[kind]
    expected = torch_sdpa(q, k, v, **options)
    actual = F.scaled_dot_product_attention(q, k, v, **options)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_broadcast_leading_dimensions():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(1, 3, 7, 8), torch.randn(2, 1, 7, 8)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), torch_sdpa(q, k, v))
    mask = torch.rand(2, 1, 5, 7) > 0.3
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, mask), torch_sdpa(q, k, v, mask))


def test_grouped_queries():
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    options = {"enable_gqa": True}
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **options), torch_sdpa(q, k, v, **options))
    with pytest.raises(ValueError, match="enable_gqa"):
        F.scaled_dot_product_attention(q, k, v)


def test_mask_and_causal_combine():
    q = torch.randn(2, 3, 5, 8)
    mask = torch.rand(5, 5) > 0.3
    mask.fill_diagonal_(True)
    expected = torch_sdpa(q, q, q, mask & torch.ones(5, 5).tril().bool())
    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q, mask, is_causal=True), expected)


def test_gradients_agree():
    leaves = [torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bias = torch.randn(3, 5, 5, dtype=torch.float64, requires_grad=True)
    actual = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, bias).square().sum(), [*leaves, bias])
    expected = torch.autograd.grad(torch_sdpa(*leaves, bias).square().sum(), [*leaves, bias])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_dropout():
    q = torch.randn(2, 3, 50, 8)
    torch.manual_seed(1)
    out = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    assert not torch.equal(out, F.scaled_dot_product_attention(q, q, q, dropout_p=0.5))
    assert torch.equal(F.scaled_dot_product_attention(q, q, q, dropout_p=1.0), torch.zeros_like(q))


def test_errors():
    q = torch.randn(2, 3, 5, 8)
    with pytest.raises(ValueError, match="attn_mask"):
        F.scaled_dot_product_attention(q, q, q, torch.ones(4, 5).bool())
    with pytest.raises(ValueError, match="query"):
        F.scaled_dot_product_attention(q[0, 0, 0], q, q)
    with pytest.raises(TypeError, match="value"):
        F.scaled_dot_product_attention(q, q, None)
