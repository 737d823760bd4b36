"""Dropout: the kernels' mask is the reference's, for every instruction set, and follows torch's generator."""

import pytest
import torch

from tformer_ext import functional as F
from tformer_ext import reference
from tformer_ext.reference.philox import keep_scale, threshold

SEEDS = (0, 1, -1, 2**62 - 1, 123456789012345)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_attention_mask_is_the_references(seed, p, isa_of_attention):
    B, H, Sq, Sk = 2, 3, 7, 150
    q, k = torch.zeros(B, H, Sq, 4), torch.zeros(B, H, Sk, 4)
    out = F.attention(q, k, torch.eye(Sk).expand(B, H, Sk, Sk), dropout_p=p, dropout_seed=seed)
    kept = reference.attention_dropout_mask(seed, B, H, Sq, Sk, p)
    assert torch.equal(out != 0, kept)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], keep_scale(p) / Sk))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_norm_mask_is_the_references(seed, p, isa):
    x = torch.ones(9, 201)
    _, h = F.residual_layer_norm(x, dropout_p=p, dropout_seed=seed, return_residual=True)
    kept = reference.norm_dropout_mask(seed, 9, 201, p)
    assert torch.equal(h != 0, kept)
    torch.testing.assert_close(h[kept], torch.full_like(h[kept], keep_scale(p)))


@pytest.mark.parametrize("p", [0.3, 0.02, 2**-15])
def test_share_of_dropped(p):
    kept = reference.attention_dropout_mask(7, 8, 4, 128, 256, p)
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    # the same for every place that a number can have in its block
    apart = kept.view(-1, 64).double()
    assert (abs(apart.mean(0) - (1 - p)) < 5 * (p * (1 - p) / len(apart)) ** 0.5 + 1e-9).all()
    # neighbours, and the two numbers of a word, are dropped independently of one another
    for distance in (1, 16, 32):
        both = (~kept[..., :-distance] & ~kept[..., distance:]).double()
        assert abs(both.mean().item() - p * p) < 5 * (p * p / both.numel()) ** 0.5 + 1 / both.numel()


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 1 - 2**-16, 1 - 1e-7, 1.0])
def test_expectation_is_kept(p):
    """What is kept, and by how much: p is rounded to a multiple of 2**-16, the factor belongs to that p."""
    kept = 1 - threshold(p) / 2**16
    assert abs(kept - (1 - p)) <= 2**-16 and (p == 1 or keep_scale(p) * kept == 1)
    assert keep_scale(1.0) == 0


def test_attention_and_norm_draw_apart():
    a = reference.attention_dropout_mask(7, 1, 1, 64, 64, 0.5)[0, 0]
    n = reference.norm_dropout_mask(7, 64, 64, 0.5)
    assert 0.4 < (a == n).double().mean() < 0.6


def test_manual_seed_governs():
    q = torch.randn(1, 2, 40, 8)

    def draw(seed):
        torch.manual_seed(seed)
        return F.attention(q, q, q, dropout_p=0.5), F.attention(q, q, q, dropout_p=0.5)

    first, second = draw(1), draw(1)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], draw(2)[0])


def test_seed_as_tensor_and_int():
    q = torch.randn(1, 2, 40, 8)
    by_int = F.attention(q, q, q, dropout_p=0.5, dropout_seed=77)
    assert torch.equal(by_int, F.attention(q, q, q, dropout_p=0.5, dropout_seed=torch.tensor(77)))


def test_no_seed_is_drawn_without_dropout():
    q = torch.randn(1, 2, 4, 8)
    torch.manual_seed(1)
    F.attention(q, q, q)
    F.residual_layer_norm(q, q)
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(torch.rand(()), after)
