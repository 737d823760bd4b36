"""Context parallelism: what the ranks compute together is what one process computes for the whole sequence."""

import pytest
import torch
import torch.distributed as dist
from cases import Case, gradients, in_dtype, tensors
from ranks import raises
from same_maths import yardsticks
from tolerances import assert_close, assert_gradient_close, farther, yardstick_dtype

from tformer_ext import functional as F
from tformer_ext import reference
from tformer_ext.distributed import gather_sequence, ring, ring_attention, shard_sequence
from tformer_ext.distributed.seeds import numbered_seed
from tformer_ext.distributed.sequence import segments
from tformer_ext.ops.attention import _forward
from tformer_ext.reference.attention import visible_keys
from tformer_ext.reference.philox import keep_scale

SHAPE = (2, 2, 2, 48, 48, 16, 16)  # B, Hq, Hk, Sq, Sk, D, Dv
CASES = [
    Case("plain", SHAPE),
    Case("causal", SHAPE, {"causal": True}),
    Case("causal grouped", (1, 6, 2, 96, 96, 8, 24), {"causal": True}),
    Case("cross", (2, 2, 1, 32, 80, 16, 8)),
    Case("cross upper left", (2, 2, 1, 80, 32, 16, 8), {"causal": "upper_left"}),
    Case("cross lower right", (2, 2, 1, 32, 80, 16, 8), {"causal": "lower_right"}),
    Case("cross lower right with dead rows", (2, 2, 1, 80, 32, 16, 8), {"causal": "lower_right"}),
    Case("window", SHAPE, {"window": (9, 4)}),
    Case("window across parts", SHAPE, {"window": (29, -1)}),
    Case("window causal", SHAPE, {"causal": True, "window": (13, -1)}),
    Case("window of one key", SHAPE, {"window": (0, 0)}),
    Case("window cross", (1, 2, 2, 32, 80, 16, 16), {"window": (7, 30)}),
    Case("softcap and scale", SHAPE, {"softcap": 2.0, "scale": 0.4, "causal": True}),
    Case("heads after length", (2, 4, 2, 48, 48, 16, 16), {"causal": True}, layout="BSHD"),
    Case("key mask", SHAPE, {"padding": 21}),
    Case("key mask causal", SHAPE, {"padding": 21, "causal": True}),
    Case("key mask with window", SHAPE, {"padding": 21, "window": (5, 5)}),
]  # fmt: skip
LAYOUTS = ("contiguous", "zigzag")


def whole_problem(case, dtype):
    """(query, key, value), options of the reference, key mask or None, cotangents of out and lse"""
    torch.manual_seed(1)
    qkv, options = tensors(case, dtype)
    B, Hq, _, Sq, Sk, _, Dv = case.shape
    key_mask = None
    if padding := options.pop("padding", 0):
        key_mask = torch.arange(Sk).expand(B, Sk) < torch.tensor([[Sk], [Sk - padding]])[:B]
        key_mask = key_mask & (torch.rand(B, Sk) > 0.1)
        options["mask"] = key_mask[:, None, None, :]
    return qkv, options, key_mask, (torch.randn(B, Hq, Sq, Dv).to(dtype), torch.randn(B, Hq, Sq))


def part(t, layout, dim=2):
    return shard_sequence(t, dim, layout=layout)


def ring_gradients(qkv, options, key_mask, cotangents, layout):
    """Of this rank's parts: (out, lse), (gradients of query, key, value)."""
    leaves = [part(t, layout).requires_grad_() for t in qkv]
    options = {k: v for k, v in options.items() if k != "mask"}
    mask = None if key_mask is None else part(key_mask, layout, 1)
    out, lse = ring_attention(*leaves, layout=layout, key_mask=mask, return_lse=True, **options)
    return gradients(lambda *_, **__: (out, lse), leaves, {}, [part(t, layout) for t in cotangents])


def full_result(rank, world, case, dtypes):
    for dtype in dtypes:
        qkv, options, key_mask, cotangents = whole_problem(case, dtype)
        golden = gradients(reference.attention, *in_dtype(qkv, options, torch.float64, True), cotangents)
        forms = list(zip(*yardsticks(qkv, options, cotangents, yardstick_dtype(dtype)), strict=True))
        for layout in LAYOUTS:
            actual = ring_gradients(qkv, options, key_mask, cotangents, layout)
            outputs = zip(("out", "lse"), actual[0], golden[0], forms[:2], strict=True)
            grads = zip(("query", "key", "value"), actual[1], golden[1], forms[2:], strict=True)
            for check, results in ((assert_close, outputs), (assert_gradient_close, grads)):
                for name, a, g, f in results:
                    # the yardstick is the whole result's: the error of a part of it may be far smaller by chance
                    a, g = gather_sequence(a.detach(), 2, layout=layout), g.detach()
                    check(a, g, farther(f, g), f"{dtype} {layout} {name}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_give_the_full_result(case, ranks2):
    ranks2.run(full_result, case, (torch.float64, torch.float32, torch.bfloat16))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_ranks_give_the_full_result(case, ranks4):
    ranks4.run(full_result, case, (torch.float64, torch.float32))


def subgroup(rank, world):
    """Two rings of two ranks at the same time, by ProcessGroup and by DeviceMesh."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    torch.manual_seed(rank // 2)
    q = torch.randn(1, 2, 16, 8)
    expected = F.attention(q, q, q, causal=True)
    for group in (mesh["context"], mesh["context"].get_group()):
        own = shard_sequence(q, 2, group=group, layout="zigzag")
        out = ring_attention(own, own, own, group=group, layout="zigzag", causal=True)
        torch.testing.assert_close(gather_sequence(out, 2, group=group, layout="zigzag"), expected)
    with raises(ValueError, "group: expected a DeviceMesh of one dimension"):
        ring_attention(q, q, q, group=mesh)


def test_rings_of_subgroups(ranks4):
    ranks4.run(subgroup)


def one_rank(rank, world):
    groups = [dist.new_group([r]) for r in range(world)]
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    options = {"causal": True, "window": (5, -1), "dropout_p": 0.3, "dropout_seed": 4}
    expected = F.attention(q, k, k, **options)
    out = ring_attention(q, k, k, group=groups[rank], **options)
    torch.testing.assert_close(out, expected)
    empty = q[:0]
    assert ring_attention(empty, empty, empty, causal=True).shape == empty.shape


def test_a_ring_of_one_is_attention(ranks2):
    ranks2.run(one_rank)


def test_one_process_without_a_group_is_told():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="group: expected an initialised process group"):
        ring_attention(q, q, q)
    with pytest.raises(ValueError, match="group: expected an initialised process group"):
        shard_sequence(q)


def visible_pairs(rank, world, layout, low, high, Sq, Sk):
    """The pairs that the blocks of the rank cover, each counted, as a matrix over the whole sequence."""
    case = ring._Ring(None, rank, world, layout, low, high, 1.0, 0.0, 0.0)
    used = "contiguous" if low is None and high is None else layout
    seen = torch.zeros(Sq * world, Sk * world, dtype=torch.int)
    numbers = []
    for source in range(world):
        rows_at, keys_at = (
            torch.cat([torch.arange(start, start + n) for _, start, n in segments(r, world, S, used)])
            for r, S in ((rank, Sq), (source, Sk))
        )
        for block in ring.blocks(case, source, Sq, Sk):
            i, j = rows_at[block.rows], keys_at[block.keys]
            mask, _ = visible_keys(len(i), len(j), window=block.window)
            assert mask[0, 0].any(), "a block of which nothing is seen"
            seen[i[:, None], j] += mask[0, 0].int()
            numbers.append(block.number)
    assert len(set(numbers)) == len(numbers)
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("Sq, Sk", [(4, 4), (2, 8), (6, 2)])
def test_blocks_cover_what_is_seen_once_and_nothing_else(layout, Sq, Sk):
    for world in (1, 2, 3, 4):
        distance = torch.arange(Sk * world) - torch.arange(Sq * world)[:, None]
        for low in (None, -100, -7, -3, 0, 3, 100):
            for high in (None, -7, -2, 0, 1, 5, 100):
                if low is not None and high is not None and low > high:
                    continue
                expected = torch.ones_like(distance, dtype=torch.bool)
                expected &= (distance >= low) if low is not None else True
                expected &= (distance <= high) if high is not None else True
                seen = sum(visible_pairs(r, world, layout, low, high, Sq, Sk) for r in range(world))
                assert torch.equal(seen, expected.int()), (world, low, high)


def count_calls(rank, world, layout):
    """(calls of the operator, query-key pairs in their windows) of a causal forward"""
    calls, pairs = 0, 0

    def counted(q, k, v, *rest):
        nonlocal calls, pairs
        visible, _ = visible_keys(q.shape[2], k.shape[2], window=rest[9:11])
        calls, pairs = calls + 1, pairs + int(visible.sum())
        return _forward(q, k, v, *rest)

    q = torch.randn(1, 1, 64 // world, 8)
    ring._forward = counted
    try:
        ring_attention(q, q, q, causal=True, layout=layout)
    finally:
        ring._forward = _forward
    return calls, pairs


def test_hidden_blocks_are_not_computed_and_zigzag_is_balanced(ranks4):
    contiguous, zigzag = (ranks4.run(count_calls, layout) for layout in LAYOUTS)
    assert [calls for calls, _ in contiguous] == [1, 2, 3, 4]
    assert sum(pairs for _, pairs in contiguous) == sum(pairs for _, pairs in zigzag) == 64 * 65 // 2
    assert len({pairs for _, pairs in zigzag}) == 1


def repeats(rank, world):
    case = Case("", (2, 4, 2, 96, 96, 16, 16), {"causal": True, "dropout_p": 0.2, "dropout_seed": 5})
    qkv, options, key_mask, cotangents = whole_problem(case, torch.float32)
    for layout in LAYOUTS:
        first, *others = (ring_gradients(qkv, options, key_mask, cotangents, layout) for _ in range(3))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip([*first[0], *first[1]], [*other[0], *other[1]], strict=True))


def test_repeats_give_the_same_bits(ranks4):
    ranks4.run(repeats)


def dropout(rank, world, layout, causal):
    """Against dense attention with the mask put together from those of the blocks."""
    S, p, seed = 32, 0.4, torch.tensor(77)
    case = Case("", (2, 2, 2, S, S, 8, 8), {"causal": causal})
    qkv, options, _, cotangents = whole_problem(case, torch.float64)
    kept = torch.zeros(2, 2, S, S, dtype=torch.bool)
    settings = ring._Ring(None, rank, world, layout, None, 0 if causal else None, 1.0, 0.0, p)
    for r in range(world):
        for source in range(world):
            rows_at, keys_at = (
                torch.cat([torch.arange(start, start + n) for _, start, n in segments(n, world, S // world, layout)])
                for n in (r, source)
            )
            for block in ring.blocks(settings._replace(rank=r), source, S // world, S // world):
                i, j = rows_at[block.rows], keys_at[block.keys]
                own = reference.attention_dropout_mask(numbered_seed(seed, block.number), 2, 2, len(i), len(j), p)
                kept[:, :, i[:, None], j] = own
    visible = torch.ones(S, S, dtype=torch.bool).tril() if causal else torch.ones(S, S, dtype=torch.bool)

    def dense(q, k, v, return_lse):
        scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~visible, -torch.inf)
        return (scores.softmax(-1) * kept * keep_scale(p)) @ v, scores.logsumexp(-1)

    expected = gradients(dense, [t.requires_grad_() for t in qkv], {}, cotangents)
    options.update(dropout_p=p, dropout_seed=seed)
    actual = ring_gradients(qkv, options, None, cotangents, layout)
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, part(e, layout))
    return kept


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_is_the_mask_that_the_document_says(layout, causal, ranks2):
    kept, again = ranks2.run(dropout, layout, causal)
    assert torch.equal(kept, again)
    quarters = [kept[:, :, i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)]
    if not causal:
        same = [torch.equal(a, b) for n, a in enumerate(quarters) for b in quarters[:n]]
        assert not any(same) and abs(kept.double().mean().item() - 0.6) < 0.05


def errors(rank, world):
    q = torch.randn(1, 2, 8, 8)
    for error, message, call in [
        (ValueError, "layout: expected", lambda: ring_attention(q, q, q, layout="striped")),
        (ValueError, "query: expected an even number", lambda: ring_attention(q[:, :, :7], q, q, layout="zigzag")),
        (ValueError, "key: expected", lambda: ring_attention(q, q[..., :4], q)),
        (TypeError, "group: expected a ProcessGroup", lambda: ring_attention(q, q, q, group="world")),
        (TypeError, "key_mask: expected a bool tensor", lambda: ring_attention(q, q, q, key_mask=torch.ones(1, 8))),
        (ValueError, "key_mask: expected", lambda: ring_attention(q, q, q, key_mask=torch.ones(8, dtype=torch.bool))),
        (ValueError, "dropout_p: expected", lambda: ring_attention(q, q, q, dropout_p=2.0)),
        (ValueError, "causal: expected", lambda: ring_attention(q, q, q, causal="diagonal")),
        (TypeError, "unexpected keyword argument 'bias'", lambda: ring_attention(q, q, q, bias=q)),
        (ValueError, "query: expected the same", lambda: ring_attention(q[:, :, rank:], q, q)),
        (ValueError, "causal: expected the same", lambda: ring_attention(q, q, q, causal=rank == 0)),
        (ValueError, "tensor: expected a length along dim 2", lambda: shard_sequence(q[:, :, :7], 2)),
        (ValueError, "tensor: expected a length along dim 2", lambda: shard_sequence(q[:, :, :6], 2, layout="zigzag")),
        (ValueError, "dim: expected", lambda: shard_sequence(q, 4)),
        (TypeError, "tensor: expected a torch.Tensor", lambda: gather_sequence([q])),
        (ValueError, "tensor: expected the same shape", lambda: gather_sequence(q[:, :, rank:], 2)),
    ]:
        with raises(error, message):
            call()


def test_errors_name_the_argument(ranks2):
    ranks2.run(errors)


def round_trip(rank, world):
    whole = torch.randn(3, 8 * world, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(world, *whole.shape, dtype=torch.float64)
    for layout in LAYOUTS:
        own = shard_sequence(whole, layout=layout)
        assert own.shape == (3, 8, 5) and own.is_contiguous()
        (gradient,) = torch.autograd.grad(own.sum(), whole, retain_graph=True)
        assert torch.equal(shard_sequence(gradient, layout=layout), torch.ones_like(own))
        assert gradient.sum() == own.numel()
        back = gather_sequence(own, layout=layout)
        assert torch.equal(back, whole)
        # the ranks weigh the whole differently: the gradient of a part is the sum over ranks
        (gradient,) = torch.autograd.grad((back * weights[rank]).sum(), own)
        torch.testing.assert_close(gradient, shard_sequence(weights.sum(0), layout=layout))
    tokens = torch.arange(4 * world).expand(2, -1)
    assert torch.equal(gather_sequence(shard_sequence(tokens, -1), -1), tokens)


def test_sharding_and_gathering(ranks2, ranks4):
    ranks2.run(round_trip)
    ranks4.run(round_trip)


def citizenship(rank, world):
    """Autocast, no_grad, checkpointing, one-sided gradients."""
    q, k, v = (torch.randn(1, 2, 8, 8, requires_grad=True) for _ in range(3))

    def run(q, k, v):
        return ring_attention(q, k, v, causal=True, dropout_p=0.3)

    torch.manual_seed(5)
    expected = torch.autograd.grad(run(q, k, v).sum(), (q, k, v))
    torch.manual_seed(5)
    again = torch.utils.checkpoint.checkpoint(run, q, k, v, use_reentrant=False)
    for a, e in zip(torch.autograd.grad(again.sum(), (q, k, v)), expected, strict=True):
        assert torch.equal(a, e)
    with torch.no_grad():
        assert run(q, k, v).grad_fn is None
    with torch.autocast("cpu", torch.bfloat16):
        assert ring_attention(q, k, v).dtype == torch.bfloat16
    out, lse = ring_attention(q, k, v, return_lse=True)
    grads = torch.autograd.grad(lse.sum(), (q, k, v))
    assert grads[0].ne(0).any() and grads[2].eq(0).all() and out.dtype == torch.float32


def test_citizenship(ranks2):
    ranks2.run(citizenship)


def compiled(rank, world):
    q = torch.randn(1, 2, 8, 8, requires_grad=True)

    def run(q):
        return ring_attention(q * 2, q, q, causal=True).sum() + 1

    (expected,) = torch.autograd.grad(run(q), q)
    (gradient,) = torch.autograd.grad(torch.compile(run, backend="aot_eager")(q), q)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.slow
def test_compile_breaks_the_graph_and_goes_on(ranks2):
    ranks2.run(compiled)
