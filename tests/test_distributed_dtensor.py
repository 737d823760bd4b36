"""The operators on DTensors: one process's results, on shards that stay shards, without any communication."""

import subprocess
import sys

import pytest
import torch
from ranks import Communication, raises
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tformer_ext import functional as F
from tformer_ext.distributed.seeds import numbered_seed

B, HQ, HK, SQ, SK, D = 4, 8, 4, 10, 12, 8
NAMES = ("query", "key", "value", "bias", "sinks")
# keywords of F.attention: shapes of floating ones with a gradient, or values
OPTIONS = {
    "plain": {},
    "causal window": {"causal": "lower_right", "window": (5, -1), "scale": 0.3, "softcap": 2.0},
    "bias full": {"bias": (B, HQ, SQ, SK)},
    "bias per head": {"bias": (1, HQ, SQ, SK)},
    "bias per batch": {"bias": (B, 1, 1, SK)},
    "bias for all": {"bias": (SQ, SK)},
    "mask": {"mask": torch.rand(B, 1, SQ, SK, generator=torch.Generator().manual_seed(1)) > 0.3},
    "slopes": {"alibi_slopes": torch.arange(HQ) * 0.1},
    "slopes per batch": {"alibi_slopes": torch.arange(B * HQ).view(B, HQ) * 0.1},
    "sinks": {"sinks": (HQ,)},
    "key lengths": {"key_lengths": torch.tensor([12, 3, 0, 7])},
}


def problem(name):
    """Tensors with a gradient by name, the other keywords, and weights of the output; the same on every rank."""
    torch.manual_seed(0)
    shapes = {"query": (B, HQ, SQ, D), "key": (B, HK, SK, D), "value": (B, HK, SK, D)}
    shapes |= {k: v for k, v in OPTIONS[name].items() if k in NAMES}
    tensors = {k: torch.randn(v, dtype=torch.float64, requires_grad=True) for k, v in shapes.items()}
    others = {k: v for k, v in OPTIONS[name].items() if k not in shapes}
    return tensors, others, torch.randn(B, HQ, SQ, D, dtype=torch.float64)


def attend(tensors, others, weights):
    """(out, lse, *gradients of the tensors)"""
    out, lse = F.attention(**tensors, **others, return_lse=True)
    loss = (out * weights).sum()
    if "key_lengths" not in others:  # some of them are 0, and lse is -inf
        loss = loss + lse.square().sum()
    return out, lse, *torch.autograd.grad(loss, list(tensors.values()))


def expected_placement(name, shape, cut):
    """Of the gradient of a tensor that is whole, where the batch (0) or the heads (1) are cut."""
    if name == "sinks":
        return Shard(0) if cut == 1 else Partial()
    missing = 4 - len(shape)
    return Shard(cut - missing) if cut >= missing and shape[cut - missing] > 1 else Partial()


def on_shards(rank, world, name, mesh_shape, placements):
    tensors, others, weights = problem(name)
    expected = attend(tensors, others, weights)
    mesh = init_device_mesh("cpu", mesh_shape)
    cut = [placements] * 3 + [[Replicate()] * mesh.ndim] * (len(tensors) - 3)
    sharded = {
        k: distribute_tensor(t.detach(), mesh, p).requires_grad_()
        for (k, t), p in zip(tensors.items(), cut, strict=True)
    }
    weights = distribute_tensor(weights, mesh, placements)
    with Communication() as communication:
        actual = attend(sharded, others, weights)
    assert communication.counts == {}
    for t in actual[:5]:
        assert list(t.placements) == placements
    for (k, t), g in zip(list(tensors.items())[3:], actual[5:], strict=True):
        assert list(g.placements) == [expected_placement(k, t.shape, p.dim) for p in placements]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.full_tensor(), e)
    # plain tensors beside DTensors are the same on every rank, and so are their gradients
    plain = {k: sharded[k] if k in NAMES[:3] else t for k, t in tensors.items()}
    for a, e in zip(attend(plain, others, weights)[5:], expected[5:], strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_on_two_ranks(name, ranks2):
    for placement in (Shard(0), Shard(1)):
        ranks2.run(on_shards, name, (2,), [placement])


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_on_four_ranks(name, ranks4):
    ranks4.run(on_shards, name, (2, 2), [Shard(0), Shard(1)])


def packed(rank, world):
    """Packed sequences have no batch: their heads are cut."""
    mesh = init_device_mesh("cpu", (world,))
    q, k = torch.randn(20, 4, D), torch.randn(20, 2, D)
    bounds = torch.tensor([0, 7, 7, 20])
    expected = F.attention_varlen(q, k, k, bounds, bounds, causal=True)
    q, k = (distribute_tensor(t, mesh, [Shard(1)]) for t in (q, k))
    out = F.attention_varlen(q, k, k, bounds, bounds, causal=True)
    assert out.placements == (Shard(1),)
    torch.testing.assert_close(out.full_tensor(), expected)


def test_packed_sequences(ranks2):
    ranks2.run(packed)


def inner(tensors, weights):
    terms = [(t * w).sum() for t, w in zip(tensors, weights, strict=True)]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]  # sum() starts from 0, which adds up what is Partial


def norms(rank, world, mesh_shape, placements):
    mesh = init_device_mesh("cpu", mesh_shape)
    tensors = [torch.randn(4, 6, 16, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    tensors += [torch.randn(16, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    whole = [Replicate()] * mesh.ndim
    for function in (F.residual_layer_norm, F.residual_rms_norm):
        for keep in (False, True):
            outputs = function(*tensors, return_residual=keep)
            outputs = outputs if keep else (outputs,)
            weights = [torch.randn_like(t) for t in outputs]
            loss = inner(outputs, weights)
            expected = (*outputs, *torch.autograd.grad(loss, tensors))
            cut = [
                distribute_tensor(t.detach(), mesh, p).requires_grad_()
                for t, p in zip(tensors, (placements, placements, whole, whole), strict=True)
            ]
            weights = [distribute_tensor(t, mesh, placements) for t in weights]
            with Communication() as communication:
                actual = function(*cut, return_residual=keep)
                actual = actual if keep else (actual,)
                loss = inner(actual, weights)
                actual = (*actual, *torch.autograd.grad(loss, cut))
                with torch.no_grad():
                    inference = function(*cut)
            assert communication.counts == {}
            for a, e in zip((inference, *actual), (expected[0], *expected), strict=True):
                torch.testing.assert_close(a.full_tensor(), e)
            for t in (inference, *actual[:-2]):
                assert list(t.placements) == placements
            for t in actual[-2:]:
                assert list(t.placements) == [Partial()] * mesh.ndim
            # a plain residual and plain parameters are the same on every rank
            mixed = [cut[0], *tensors[1:]]
            gradient = torch.autograd.grad((function(*mixed) * weights[0]).sum(), mixed)
            same = torch.autograd.grad((function(*tensors) * weights[0].full_tensor()).sum(), tensors)
            for a, e in zip(gradient, same, strict=True):
                torch.testing.assert_close(a.full_tensor() if isinstance(a, DTensor) else a, e)


def test_norms_on_two_ranks(ranks2):
    for placement in (Shard(0), Shard(1)):
        ranks2.run(norms, (2,), [placement])


def test_norms_on_four_ranks(ranks4):
    ranks4.run(norms, (2, 2), [Shard(0), Shard(1)])


def whole_operands(rank, world):
    """Replicated operands stay whole; one that has to be added up is."""
    mesh = init_device_mesh("cpu", (world,))
    q, x = torch.randn(2, 2, 6, D), torch.randn(4, 16)
    same = distribute_tensor(q, mesh, [Replicate()])
    out = F.attention(same, same, same, causal=True)
    assert out.placements == (Replicate(),)
    torch.testing.assert_close(out.to_local(), F.attention(q, q, q, causal=True))
    # query whole, keys cut: the query is cut too, which costs nothing
    heads = distribute_tensor(q, mesh, [Shard(1)])
    out = F.attention(same, heads, heads)
    assert out.placements == (Shard(1),)
    torch.testing.assert_close(out.full_tensor(), F.attention(q, q, q))
    parts = DTensor.from_local(x * (rank + 1), mesh, [Partial()])
    y = F.residual_layer_norm(parts, distribute_tensor(x, mesh, [Replicate()]))
    torch.testing.assert_close(y.full_tensor(), F.residual_layer_norm(x * 3, x))


def test_replicated_and_partial_operands(ranks2):
    ranks2.run(whole_operands)


def decisions(rank, world):
    """DTensor remembers decisions by its arguments: other arguments of the same shapes are not taken for them."""
    mesh = init_device_mesh("cpu", (world,))
    q, x, v = torch.randn(4, 4, 6, D), torch.randn(4, 16), torch.rand(16) + 0.5
    heads, rows = distribute_tensor(q, mesh, [Shard(1)]), distribute_tensor(x, mesh, [Shard(0)])
    per_head = torch.rand(4)
    for options in ({"alibi_slopes": per_head}, {"sinks": per_head}):
        expected = F.attention(q, q, q, **options)
        torch.testing.assert_close(F.attention(heads, heads, heads, **options).full_tensor(), expected)
    for function in (F.residual_layer_norm, F.residual_rms_norm):
        for parameters in ((v, None), (None, v), (v, v)):
            for keep in (False, True):
                expected = function(x, x, *parameters, return_residual=keep)
                leaf = rows.detach().requires_grad_()
                actual = function(leaf, leaf, *parameters, return_residual=keep)
                for a, e in zip(actual if keep else [actual], expected if keep else [expected], strict=True):
                    torch.testing.assert_close(a.full_tensor(), e)
                    a.sum().backward(retain_graph=True)


def test_decisions_are_not_mixed_up(ranks2):
    ranks2.run(decisions)


def dropout(rank, world):
    """Each shard draws for itself, the first as one process would, replicas draw the same."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    data, tensor = mesh.get_coordinate()
    q, x = torch.randn(4, 4, 12, D), torch.randn(4, 6, 16)
    options = {"dropout_p": 0.4, "dropout_seed": 7}
    weights = {}
    for placements, index in (
        ([Shard(0), Shard(1)], 2 * data + tensor),
        ([Replicate(), Shard(1)], tensor),
        ([Shard(0), Replicate()], data),
        ([Replicate(), Replicate()], 0),
    ):
        seed = numbered_seed(torch.tensor(7), index)
        cut = distribute_tensor(q, mesh, placements).requires_grad_()
        out = F.attention(cut, cut, cut, **options)
        assert list(out.placements) == placements
        local = cut.to_local().detach().requires_grad_()
        expected = F.attention(local, local, local, dropout_p=0.4, dropout_seed=seed)
        assert torch.equal(out.to_local(), expected)
        (gradient,) = torch.autograd.grad(out, cut, torch.ones_like(out))
        assert list(gradient.placements) == placements
        torch.testing.assert_close(
            gradient.to_local(), torch.autograd.grad(expected, local, torch.ones_like(expected))[0]
        )
        rows = distribute_tensor(x, mesh, placements).requires_grad_()
        kept = F.residual_layer_norm(rows, torch.zeros_like(rows), return_residual=True, **options)[1]
        local = rows.to_local().detach()
        same = F.residual_layer_norm(local, None, return_residual=True, dropout_p=0.4, dropout_seed=seed)[1]
        assert list(kept.placements) == placements and torch.equal(kept.to_local(), same)
        (gradient,) = torch.autograd.grad(kept.sum(), rows)
        assert list(gradient.placements) == placements and torch.equal(gradient.to_local() != 0, same != 0)
        weights[str(placements)] = same != 0
    # a seed of torch's generator, which agrees on all ranks: shards differ, and a repeat under the same seed does not
    cut = distribute_tensor(torch.ones(8, 16), mesh, [Shard(0), Replicate()])
    torch.manual_seed(3)
    first = F.residual_layer_norm(cut, return_residual=True, dropout_p=0.5)[1].to_local()
    again = F.residual_layer_norm(cut, return_residual=True, dropout_p=0.5)[1].to_local()
    torch.manual_seed(3)
    repeat = F.residual_layer_norm(cut, return_residual=True, dropout_p=0.5)[1].to_local()
    assert torch.equal(first, repeat) and not torch.equal(first, again)
    # keys cut where the query is whole: the query is cut before seeds are made
    whole, heads = (distribute_tensor(q, mesh, [Replicate(), p]) for p in (Replicate(), Shard(1)))
    assert F.attention(whole, heads, heads, **options).placements == (Replicate(), Shard(1))
    return {**weights, "drawn": first != 0}


def test_dropout_on_shards(ranks4):
    ranks = ranks4.run(dropout)
    both, tensor, data, none = (str(p) for p in (
        [Shard(0), Shard(1)], [Replicate(), Shard(1)], [Shard(0), Replicate()], [Replicate(), Replicate()]
    ))  # fmt: skip

    def equal(name, a, b):
        return torch.equal(ranks[a][name], ranks[b][name])

    assert not any(equal(both, a, b) for a in range(4) for b in range(a))
    assert equal(tensor, 0, 2) and equal(tensor, 1, 3) and not equal(tensor, 0, 1)
    for name in (data, "drawn"):
        assert equal(name, 0, 1) and equal(name, 2, 3) and not equal(name, 0, 2)
    assert all(equal(none, 0, r) for r in range(4))


def errors(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    q, kv = torch.randn(2, 12, 6, D), torch.randn(2, 3, 6, D)

    def cut(t, dim):
        return distribute_tensor(t, mesh, [Shard(dim)])

    def second(function):
        leaf = cut(q, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()

    for error, message, call in [
        (NotImplementedError, "query: second derivatives", lambda: second(lambda t: F.attention(t, t, t))),
        (NotImplementedError, "x: second", lambda: second(lambda t: F.residual_layer_norm(t, dropout_p=0.5))),
        (ValueError, "query: expected a DTensor sharded along", lambda: F.attention(cut(q, 2), cut(q, 2), cut(q, 2))),
        (ValueError, "value: expected a DTensor sharded along", lambda: F.attention(cut(q, 1), cut(q, 1), cut(q, 3))),
        (ValueError, "key: expected a number of heads", lambda: F.attention(cut(q, 1), cut(kv, 1), cut(kv, 1))),
        (TypeError, "key: expected a DTensor as query is", lambda: F.attention(cut(q, 1), q, q)),
        (ValueError, "x: expected a DTensor sharded along", lambda: F.residual_layer_norm(cut(q, 3))),
        (ValueError, "residual: expected a DTensor", lambda: F.residual_layer_norm(cut(q, 2), cut(q, 3))),
        (TypeError, "x: expected a DTensor as residual is", lambda: F.residual_layer_norm(q, cut(q, 1))),
        (ValueError, "bias: expected a shape", lambda: F.attention(*[cut(q, 0)] * 3, bias=torch.zeros(6, 6, 6))),
    ]:
        for _ in range(2):  # also where DTensor has met the arguments before
            with raises(error, message):
                call()


def test_errors_name_the_argument(ranks2):
    ranks2.run(errors)


def test_dtensor_is_not_imported_by_us():
    code = (
        "import sys, torch, tformer_ext as tx\n"
        "tx.functional.attention(*[torch.randn(1, 1, 4, 8, requires_grad=True)] * 3, dropout_p=0.1).sum().backward()\n"
        "tx.ResidualLayerNorm(8)(torch.randn(2, 8), torch.randn(2, 8)).sum().backward()\n"
        "tx.distributed.ring_attention\n"
        "assert 'torch.distributed.tensor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
