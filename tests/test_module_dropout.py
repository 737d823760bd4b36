"""Dropout as a module against torch's: values, masks, where the counters draw and where torch does."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import tformer_ext as tx
from tformer_ext import functional as F
from tformer_ext import reference
from tformer_ext.modules import dropout as ours
from tformer_ext.reference.philox import keep_scale

P = 0.25  # a multiple of 2**-16, so that both scale by the same
# shape -> columns of the rows that it is drawn in: its own, common divisors, 0 where torch draws
SHAPES = {
    (300, 200): 200, (2, 40, 64): 64, (5000,): 5000, (16384,): 16384, (8192, 1): 1024, (3, 512, 4): 1024,
    (2, 20000): 64, (2, 3, 20, 50): 50, (51, 1, 128): 128, (4, 32, 7, 7): 128,
    (20001,): 0, (5000, 1): 0, (3, 40, 31): 0, (4, 64): 0, (0, 128): 0, (): 0,
}  # fmt: skip


@pytest.fixture
def torchs(monkeypatch):
    """Counts the calls of torch's dropout."""
    counted, function = [], nn.functional.dropout

    def counting(x, *args, **kwargs):
        counted.append(x.shape)
        return function(x, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "dropout", counting)
    return counted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, torchs):
    dropout, columns = tx.Dropout(P), SHAPES[shape]
    x = (torch.rand(shape) + 1).to(dtype).requires_grad_()
    torch.manual_seed(2)
    y = dropout(x)
    assert y.shape == x.shape and y.dtype == dtype and y.is_contiguous() and len(torchs) == (columns == 0)
    kept = y != 0
    torch.testing.assert_close(y[kept], (x / (1 - P))[kept])
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    torch.testing.assert_close(g, kept / torch.tensor(1 - P, dtype=dtype))
    torch.manual_seed(2)
    with torch.no_grad():
        assert torch.equal(dropout(x), y)
    if columns:
        assert not torch.equal(dropout(x), y)
        torch.manual_seed(2)
        seed = torch.randint(0, 2**62, ())
        mask = reference.norm_dropout_mask(seed, x.numel() // columns, columns, P)
        assert torch.equal(kept, mask.view(shape))
        strided = torch.ones(*shape[:-1], shape[-1], 2, dtype=dtype)[..., 0]  # a gradient that is not contiguous
        assert torch.equal(torch.autograd.grad(y, x, strided)[0], g)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.93])
@pytest.mark.parametrize("shape", [(1000, 300), (300000, 1), (6000, 50)], ids=str)
def test_share_of_dropped(p, shape):
    y = tx.Dropout(p)(torch.ones(shape))
    share = (y != 0).double().mean().item()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / y.numel()) ** 0.5
    assert y.unique().tolist() == pytest.approx([0, keep_scale(p)])


def test_as_torchs(torchs):
    """What draws nothing, what is no probability, and where x itself is changed."""
    x = torch.randn(100, 128)
    assert tx.Dropout(0.0)(x) is x and tx.Dropout(P).eval()(x) is x
    assert tx.Dropout(0)(x) is x and tx.Dropout(1)(x).eq(0).all()
    assert torch.equal(tx.Dropout(1.0)(x), nn.Dropout(1.0)(x))
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        tx.Dropout(1.5)
    wrong = tx.Dropout(P)
    wrong.p = 1.5
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        wrong(x)
    del torchs[:]
    before = x.clone()
    assert tx.Dropout(P, inplace=True)(x) is x and len(torchs) == 1
    kept = x != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(x[kept], before[kept] / (1 - P))
    assert tx.Dropout(P, inplace=True).eval()(x) is x


def test_module():
    dropout = tx.Dropout(P, True)
    assert isinstance(dropout, nn.Dropout) and repr(dropout) == repr(nn.Dropout(P, True)) and not dropout.state_dict()
    for twin in (copy.deepcopy(dropout), pickle.loads(pickle.dumps(dropout))):
        assert type(twin) is tx.Dropout and twin.p == P and twin.inplace


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_plain_call_goes_to_torch(torchs):
    dropout, x = tx.Dropout(P), torch.ones(100, 128)

    class Tagged(torch.Tensor):
        pass

    def by_torch(x, function=dropout):
        del torchs[:]
        y = function(x)
        assert torchs
        return y

    assert type(by_torch(x.as_subclass(Tagged))) is Tagged
    assert by_torch(x.t()).shape == (128, 100)
    assert by_torch(x.to("meta")).is_meta
    mapped = by_torch(x.view(2, 50, 128), torch.func.vmap(dropout, randomness="different"))
    torch.testing.assert_close(mapped.unique(), torch.tensor([0, 1 / (1 - P)]))
    torch.manual_seed(1)
    g = by_torch(x, torch.func.grad(lambda t: dropout(t).sum()))
    torch.manual_seed(1)
    assert torch.equal(g, nn.Dropout(P)(x))
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(by_torch(forward_ad.make_dual(x, x * 2)))
    assert torch.equal(y.tangent, y.primal * 2)
    traced = by_torch(x, lambda x: torch.jit.trace(dropout, x, check_trace=False))
    assert [node.kind() for node in traced.graph.nodes()][-1] == "aten::dropout"
    assert "_AddDropout" not in str(torch.fx.symbolic_trace(dropout).graph)


def test_surroundings_that_change_nothing(torchs):
    dropout, x = tx.Dropout(P), torch.ones(100, 128)
    with torch.device("meta"):
        assert dropout(x).device.type == "cpu"  # the seed is made where x is
    with torch.autocast("cpu", torch.bfloat16):
        assert dropout(x).dtype == torch.float32
    with torch.inference_mode():
        assert dropout(x).is_inference()
    assert not torchs


@pytest.mark.parametrize("shape", [(100, 128), (5120, 3)], ids=str)
def test_gradients_of_gradients_and_of_many(shape):
    dropout, x = tx.Dropout(P), torch.randn(shape, requires_grad=True)
    y = dropout(x)
    factor = torch.where(y == 0, 0, 1 / (1 - P))
    (g,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.sum(), x, retain_graph=True)
    torch.testing.assert_close(gg, 2 * factor * factor)
    many = torch.randn(3, *shape)
    (g,) = torch.autograd.grad(y, x, many, is_grads_batched=True)
    torch.testing.assert_close(g, many * factor)


@pytest.mark.parametrize("shape", [(100, 128), (5120, 3)], ids=str)
def test_result_may_be_changed_in_place(shape):
    x = torch.randn(shape, requires_grad=True)
    y = tx.Dropout(P)(x)
    positive = y > 0
    y.relu_().sum().backward()
    torch.testing.assert_close(x.grad, positive / (1 - P))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(reentrant, torchs):
    model = nn.Sequential(nn.Linear(32, 64), tx.Dropout(0.5), nn.Linear(64, 8), tx.Dropout(0.5))
    x, results = torch.randn(1000, 32, requires_grad=True), []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        out = run(x)
        x.grad = None
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and not torchs


def test_compile():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 64), tx.Dropout(0.5))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(100, 64)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    kept = first != 0
    torch.testing.assert_close(first[kept], (model[0](x) * 2)[kept])
    first.sum().backward()
    assert torch.isfinite(model[0].weight.grad).all()
    model.eval()
    torch.testing.assert_close(compiled(x), model[0](x))
    assert torch.export.export(model, (x,)).module()(x).shape == (100, 64)


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_layers_fuse_it_as_they_fuse_torchs(name, norm_first, torchs, monkeypatch):
    """Results, and probabilities that the norms get, before and after replacement."""
    fused, function = [], F.residual_layer_norm

    def watched(*args, dropout_p=0.0, **kwargs):
        fused.append(dropout_p)
        return function(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "residual_layer_norm", watched)
    layer = getattr(tx, name)(64, 4, 128, P, batch_first=True, norm_first=norm_first)
    inputs = [torch.randn(4, 40, 64)] * (1 + ("Decoder" in name))
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append((layer(*inputs), fused[:], len(torchs)))
        del fused[:]
        tx.replace_modules(layer)
        assert type(layer.dropout) is type(layer.dropout1) is tx.Dropout
    assert torch.equal(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]
    assert P in results[0][1] and not torchs
    assert ours.is_plain_dropout(layer.dropout)
    layer.dropout1.register_forward_hook(lambda *_: fused.append("hook"))
    assert not ours.is_plain_dropout(layer.dropout1)
    layer(*inputs)
    assert fused.count("hook") == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
def test_in_a_sum(dtype, with_residual):
    p, dropout = 0.3, nn.Dropout(0.3)
    x = (torch.rand(300, 200) + 1).to(dtype).requires_grad_()
    residual = torch.zeros(300, 200, dtype=dtype, requires_grad=True) if with_residual else None
    torch.manual_seed(2)
    y = ours.add_dropout(x, dropout, residual)
    kept = y != 0
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(y[kept], (x * keep_scale(p))[kept])
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.equal(g != 0, kept)
    torch.testing.assert_close(g[kept], torch.full_like(g[kept], keep_scale(p)))
    torch.manual_seed(2)
    assert torch.equal(ours.add_dropout(x, dropout, residual), y)
    assert not torch.equal(ours.add_dropout(x, dropout, residual), y)
    if with_residual:
        (g,) = torch.autograd.grad(ours.add_dropout(x, dropout, residual).sum(), residual)
        assert g.eq(1).all()
    assert ours.add_dropout(x, nn.Dropout(1.0)).eq(0).all()
    x = x.detach().requires_grad_()
    same = ours.add_dropout(x, nn.Dropout(0.3).eval(), residual)
    torch.testing.assert_close(same, x if residual is None else x + residual)


def test_in_a_sum_where_torchs_is_used():
    x, dropout = torch.ones(200, 300), nn.Dropout(0.5)
    seen = []
    dropout.register_forward_hook(lambda m, args, out: seen.append(out))
    assert ours.add_dropout(x, dropout) is seen[0]
    y = ours.add_dropout(x.t(), nn.Dropout(0.5), torch.ones(300, 200))
    assert set(y.unique().tolist()) == {1.0, 3.0}
    assert set(ours.add_dropout(x.half(), nn.Dropout(0.5), x).unique().tolist()) == {1.0, 3.0}
