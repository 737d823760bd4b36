"""ResidualLayerNorm and ResidualRMSNorm against torch.nn's norms."""

import pickle

import pytest
import torch
from torch import nn

import tformer_ext as tx

PAIRS = [
    (tx.ResidualLayerNorm, nn.LayerNorm, {}),
    (tx.ResidualLayerNorm, nn.LayerNorm, {"bias": False}),
    (tx.ResidualLayerNorm, nn.LayerNorm, {"elementwise_affine": False}),
    (tx.ResidualLayerNorm, nn.LayerNorm, {"eps": 1e-2}),
    (tx.ResidualRMSNorm, nn.RMSNorm, {}),
    (tx.ResidualRMSNorm, nn.RMSNorm, {"eps": 1e-2}),
    (tx.ResidualRMSNorm, nn.RMSNorm, {"elementwise_affine": False}),
]


@pytest.mark.parametrize("ours, stock, options", PAIRS, ids=range(len(PAIRS)))
@pytest.mark.parametrize("shape", [6, (6,), (4, 6)], ids=str)
def test_same_as_torch(ours, stock, options, shape):
    a, b = ours(shape, **options), stock(shape, **options)
    assert isinstance(a, stock) and list(a.state_dict()) == list(b.state_dict())
    for p in b.parameters():
        nn.init.normal_(p)
    a.load_state_dict(b.state_dict())
    x, residual = torch.randn(3, 5, 4, 6), torch.randn(3, 5, 4, 6)
    torch.testing.assert_close(a(x), b(x))
    torch.testing.assert_close(a(x, residual), b(x + residual))
    assert repr(a).replace("Residual", "") == repr(b)


def test_dropout_follows_train_and_eval():
    norm = tx.ResidualLayerNorm(64, dropout=0.5)
    x, residual = torch.randn(8, 64), torch.randn(8, 64)
    torch.manual_seed(1)
    first = norm(x, residual)
    assert not torch.equal(first, norm(x, residual))
    torch.manual_seed(1)
    assert torch.equal(norm(x, residual), first)
    norm.eval()
    torch.testing.assert_close(norm(x, residual), nn.functional.layer_norm(x + residual, (64,)))
    assert "dropout=0.5" in repr(norm)


def test_sum_is_returned_for_pre_norm():
    norm = tx.ResidualRMSNorm(16, return_residual=True, residual_dtype=torch.float32).bfloat16()
    x, stream = torch.randn(4, 16).bfloat16(), torch.randn(4, 16)
    y, h = norm(x, stream)
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    torch.testing.assert_close(h, x.float() + stream)
    y, h = norm(x)
    torch.testing.assert_close(h, x.float())


def test_pickle_and_training():
    norm = pickle.loads(pickle.dumps(tx.ResidualLayerNorm(8, dropout=0.25)))
    assert norm.dropout == 0.25
    norm(torch.randn(3, 8), torch.randn(3, 8)).sum().backward()
    assert norm.weight.grad.shape == (8,) and norm.bias.grad.eq(3).all()
