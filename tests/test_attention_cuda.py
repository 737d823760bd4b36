"""The CUDA attention kernels, run by the emulation: what the CPU kernels are asked, and what only these have."""

import pytest
import torch
from cases import CASES, Case, gradients, in_dtype, tensors
from hopper_cases import check_values
from same_maths import in_two_slices, yardsticks
from tolerances import DTYPES, assert_close, assert_gradient_close, farther, yardstick_dtype

from tformer_ext import functional as F
from tformer_ext import reference

NAMES = ("query", "key", "value", "bias or sinks", "sinks")
WIDTHS = [Case(f"head dims {D} and {Dv}", (1, 2, 1, 140, 150, D, Dv), {"causal": "lower_right"})
          for D, Dv in ((64, 64), (128, 128), (256, 256), (72, 24), (40, 200))]  # fmt: skip


def dtypes_of(case):
    """All four for the small; the long ones, which differ in ranges only, in two."""
    return DTYPES if case.shape[4] < 2000 else (torch.float32, torch.bfloat16)


def of_slices(qkv, options, cotangents):
    """One more yardstick of float32: a single product, of one feature, is not nearer than its factors are held."""
    held = [in_two_slices(t) for t in qkv]
    outs, grads = gradients(
        reference.attention,
        *in_dtype(held, options, torch.float32, True),
        (in_two_slices(cotangents[0]), cotangents[1]),
    )
    return *(t.detach() for t in outs), *grads


@pytest.mark.parametrize("case", [*CASES, *WIDTHS], ids=str)
def test_values_and_gradients(case, emulated):
    for dtype in dtypes_of(case):
        torch.manual_seed(1)
        qkv, options = tensors(case, dtype)
        B, Hq, _, Sq, _, _, Dv = case.shape
        cotangents = torch.randn(B, Hq, Sq, Dv).to(dtype), torch.randn(B, Hq, Sq)
        golden = gradients(reference.attention, *in_dtype(qkv, options, torch.float64, True), cotangents)
        same = yardsticks(qkv, options, cotangents, yardstick_dtype(dtype))
        if dtype == torch.float32:
            same.append(of_slices(qkv, options, cotangents))
        same = list(zip(*same, strict=True))
        outs, grads = gradients(F.attention, *in_dtype(qkv, options, dtype, True), cotangents)
        for name, a, g, f in zip(("out", "lse"), outs, golden[0], same[:2], strict=True):
            assert_close(a.detach(), g.detach(), farther(f, g.detach()), f"{dtype} {name}")
        for name, a, g, f in zip(NAMES, grads, golden[1], same[2:], strict=False):
            assert_gradient_close(a, g, farther(f, g), f"{dtype} gradient of {name}")


def results(case, dtype):
    """Outputs and gradients as one list."""
    torch.manual_seed(3)
    qkv, options = tensors(case, dtype)
    B, Hq, _, Sq, _, _, Dv = case.shape
    cotangents = torch.randn(B, Hq, Sq, Dv), torch.randn(B, Hq, Sq)
    outs, grads = gradients(F.attention, *in_dtype(qkv, options, dtype, True), cotangents)
    return [t.detach() for t in outs] + list(grads)


RACES = ("everything", "bias over query groups", "several key ranges", "one past the tiles", "bias per key", "dropout")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in RACES] + WIDTHS[:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_of_threads_does_not_show(case, dtype, emulated):
    expected = results(case, dtype)
    for seed in (1, 2, 3):
        emulated.set_seed(seed)
        for n, (a, b) in enumerate(zip(results(case, dtype), expected, strict=True)):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"result {n} with seed {seed}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, -1, 123456789012345])
def test_dropout_mask_is_the_references(dtype, seed, emulated):
    """Forward by what is kept of equal weights, backward by which values get a gradient."""
    B, H, Sq, Sk, p = 2, 3, 7, 150, 0.3
    q, k = torch.zeros(B, H, Sq, 4, dtype=dtype), torch.zeros(B, H, Sk, 4, dtype=dtype)
    v = torch.eye(Sk, dtype=dtype).expand(B, H, Sk, Sk).requires_grad_()
    kept = reference.attention_dropout_mask(seed, B, H, Sq, Sk, p)
    out = F.attention(q, k, v, dropout_p=p, dropout_seed=seed)
    assert torch.equal(out != 0, kept)
    for i in (0, 6):
        (grad,) = torch.autograd.grad(out[:, :, i].sum(), v, retain_graph=True)
        assert torch.equal(grad[..., 0] != 0, kept[:, :, i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_cotangents_reach_what_their_row_saw(dtype, bad, emulated):
    leaves = [torch.randn(1, 1, 100, 16).to(dtype).requires_grad_() for _ in range(3)]
    cotangent = torch.randn(1, 1, 100, 16).to(dtype)
    cotangent[0, 0, 50, 3] = bad
    position = torch.arange(100)
    for options in ({"causal": True}, {"causal": True, "mask": torch.rand(100, 100) > 0.5}):
        seen = position <= 50 if "mask" not in options else (position <= 50) & options["mask"][50]
        dq, dk, dv = (
            ~torch.isfinite(g[0, 0]) for g in torch.autograd.grad(F.attention(*leaves, **options), leaves, cotangent)
        )
        assert torch.equal(dq, (position == 50).unsqueeze(1).expand(100, 16))
        assert torch.equal(dk, seen.unsqueeze(1).expand(100, 16))
        assert torch.equal(dv, seen.unsqueeze(1) & (torch.arange(16) == 3))


def test_numbers_that_slices_do_not_hold(emulated):
    """float32 near its largest number, of which a slice is infinite."""
    big = torch.finfo(torch.float32).max
    q, k, v = (torch.randn(1, 1, n, 16) for n in (40, 70, 70))
    q[..., 7, 3], k[..., 3], v[..., 5, 2] = big, 4 * k[..., 3] / big, big
    bias, cotangent = torch.randn(1, 1, 40, 70), torch.randn(1, 1, 40, 16)
    cotangent[..., 2] = 0

    def run(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v, bias)]
        function = F.attention if dtype == torch.float32 else reference.attention
        out, lse = function(*leaves[:3], bias=leaves[3], return_lse=True)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    for n, (a, b) in enumerate(zip(run(torch.float32), run(torch.float64), strict=True)):
        assert torch.isfinite(a).all(), n
        columns = [c for c in range(a.shape[-1]) if n != 3 or c != 3] if a.dim() == 4 else ...  # dk holds sums of `big`
        a, b = a[..., columns].double(), b[..., columns]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_infinite_scores_of_float32(emulated):
    """A score of -inf takes no part, though the slices of an infinity make NaN."""
    q, k, v = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 16)
    q[..., 0], k[..., 9, 0] = -q[..., 0].abs() - 0.1, torch.inf
    there = [j for j in range(70) if j != 9]
    expected = F.attention(q, k[:, :, there], v[:, :, there], return_lse=True)
    for a, b in zip(F.attention(q, k, v, return_lse=True), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


LENGTHS = [(5, 70, 0, 130, 1), (70, 9, 3, 130, 0)]  # of queries, of keys


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": "lower_right", "window": (40, -1), "dropout_p": 0.2}], ids=str)
def test_packed_sequences(dtype, options, emulated):
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in LENGTHS)
    q, k, v = (torch.randn(int(cu[-1]), h, 24).to(dtype) for cu, h in ((cu_q, 4), (cu_k, 2), (cu_k, 2)))
    if options:
        options = options | {"dropout_seed": 5, "sinks": torch.randn(4, dtype=dtype), "alibi_slopes": torch.rand(5, 4)}
    cotangent = torch.randn(len(q), 4, 24).to(dtype)

    def run(function, to):
        leaves = [t.to(to).requires_grad_() for t in (q, k, v)]
        keywords = {n: t.to(to) if n == "sinks" else t for n, t in options.items()}
        out, lse = function(*leaves, cu_q, cu_k, **keywords, return_lse=True)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, cotangent.to(to))]

    golden = run(reference.attention_varlen, torch.float64)
    same = run(reference.attention_varlen, yardstick_dtype(dtype))
    for a, g, f in zip(run(F.attention_varlen, dtype), golden, same, strict=True):
        assert_close(a, g, f)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"causal": "lower_right", "window": (900, -1)}, {"key_lengths": [1500, 0]}], ids=str
)
def test_split_keys(dtype, options, emulated):
    """A few queries of many keys; some splits hold no visible key."""
    case = Case("", (2, 4, 2, 3, 1500, 64, 40), options, sinks=True)
    qkv, options = tensors(case, dtype)
    qkv[2][:, :, 700:] += 1  # the merge's order and weights show
    out, lse = F.attention(*qkv, **options, return_lse=True)
    golden = reference.attention(
        *in_dtype(qkv, options, torch.float64)[0], **{**options, "sinks": options["sinks"].double()}, return_lse=True
    )
    same = reference.attention(*qkv, **options, return_lse=True)
    for a, g, f in zip((out, lse), golden, same, strict=True):
        assert_close(a, g, f)


ONE = (2, 8, 2, 1, 70, 24, 40)
LONG = (2, 8, 2, 1, 600, 24, 40)  # in four splits
# One query of each head, and the blocks of its launches, that of the merge with one for each row: a head of keys is
# gone through once.
ONE_QUERY = [
    (Case("groups", ONE), 4),
    (Case("groups, split", LONG), 4 * 4 + 16),
    (Case("one key head", (2, 6, 1, 1, 70, 24, 40)), 2),
    (Case("no groups", (1, 4, 4, 1, 70, 24, 40)), 4),
    (Case("lengths", ONE, {"key_lengths": [31, 0]}), 4),
    (Case("lengths, split", LONG, {"key_lengths": [0, 411], "causal": "lower_right"}), 32),
    (Case("lower right", ONE, {"causal": "lower_right"}), 4),
    (Case("upper left", ONE, {"causal": "upper_left"}), 4),
    (Case("upper left with lengths", LONG, {"causal": "upper_left", "key_lengths": [0, 9], "window": (3, -1)}), 4),
    (Case("window", ONE, {"causal": "lower_right", "window": (20, -1)}, bias=(1, 8, 1, 70), mask=(2, 1, 1, 70)), 4),
    (Case("window, split", LONG, {"window": (550, 2)}, bias=(2, 1, 1, 600), mask=(1, 1, 1, 600)), 4 * 3 + 16),
    (Case("window of all", ONE, {"window": (69, 0), "key_lengths": [70, 31]}), 4),
    (Case("window of lengths, heads apart", ONE, {"window": (20, -1), "key_lengths": [70, 31]}), 16),
    (Case("mask per key", ONE, mask=(2, 1, 1, 70)), 4),
    (Case("mask full, split", LONG, mask=(2, 8, 1, 600)), 32),
    (Case("bias per head and key", ONE, bias=(1, 8, 1, 70)), 4),
    (Case("bias per batch and key", ONE, bias=(2, 1, 1, 70)), 4),
    (Case("bias per head, split", LONG, bias=(1, 8, 1, 1)), 32),
    (Case("softcap", ONE, {"softcap": 3.0}), 4),
    (Case("sinks, heads apart", ONE, sinks=True), 16),
    (Case("sinks, split", LONG, {"key_lengths": [600, 0]}, sinks=True), 32),
    (Case("alibi, heads apart", ONE, {"causal": "lower_right"}, alibi="BH"), 16),
    (Case("dropout, heads apart", ONE, {"dropout_p": 0.3, "dropout_seed": 3}), 16),
    (Case("two queries, heads apart", (2, 8, 2, 2, 70, 24, 40), {"causal": "lower_right"}), 16),
    (Case("heads after length", LONG, layout="BSHD"), 32),
    (Case("length first", ONE, layout="SBHD"), 4),
    (Case("packed projection", ONE, layout="packed"), 4),
    (Case("one batch for all", ONE, layout="expanded"), 4),
    (Case("odd head dims", (1, 6, 2, 1, 70, 13, 7), {"causal": "lower_right"}, layout="BSHD"), 2),
    (Case("wide heads", (1, 4, 1, 1, 130, 200, 256), {"window": (99, -1)}), 1),
    (Case("no keys", (1, 4, 2, 1, 0, 16, 16)), 2),
]  # fmt: skip


@pytest.mark.parametrize("case, blocks", ONE_QUERY, ids=str)
def test_one_query_of_heads_that_share_keys(case, blocks, emulated):
    for dtype in DTYPES:
        before = emulated.launched_blocks()
        check_values(case, dtype)
        assert emulated.launched_blocks() - before == blocks


def test_sinks_of_many_batches(emulated):
    """Blocks enough, but only the merge can add what belongs to heads."""
    case = Case("", (512, 2, 1, 1, 512, 8, 8), sinks=True)
    before = emulated.launched_blocks()
    check_values(case, torch.float32)
    assert emulated.launched_blocks() - before == 512 * 2 + 1024


# Calls that warps share by keys: a tile is 128 keys of width 64, 64 of 128, a quarter of it a warp's, two under way.
FEW_QUERIES = [
    *(Case(f"{queries} queries, {keys} keys of {D}", (1, 4, 2, queries, keys, D, D), {"causal": causal})
      for queries, keys, D, causal in (
          (1, 3, 64, False), (3, 129, 64, "lower_right"), (16, 300, 64, "lower_right"), (16, 5, 64, True),
          (2, 70, 128, False), (7, 33, 128, "lower_right"), (16, 260, 128, "lower_right"), (9, 20, 128, True))),
    Case("split", (1, 2, 1, 5, 1500, 128, 128), {"causal": "lower_right"}),
    Case("split, odd head dims", (1, 2, 1, 3, 700, 72, 40), {"window": (500, -1)}),
    Case("begin in the middle", (2, 2, 1, 4, 900, 64, 64), {"window": (75, -1), "causal": "lower_right"}),
    Case("no key for some", (3, 2, 1, 8, 300, 64, 64), {"key_lengths": [300, 0, 41], "causal": "lower_right"}),
    Case("sinks", (2, 4, 2, 6, 150, 64, 64), {"causal": "lower_right"}, sinks=True),
    Case("mask per key", (2, 4, 2, 6, 300, 128, 128), mask=(2, 1, 1, 300)),
    Case("heads after length", (2, 4, 2, 12, 150, 64, 128), layout="BSHD"),
]  # fmt: skip


@pytest.mark.parametrize("case", FEW_QUERIES, ids=str)
def test_few_queries(case, emulated):
    for dtype in (torch.bfloat16, torch.float16):
        check_values(case, dtype)
    qkv, options = tensors(case, dtype)
    expected = F.attention(*qkv, **options, return_lse=True)
    for seed in (1, 2):
        emulated.set_seed(seed)
        actual = F.attention(*qkv, **options, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype, splits", [(torch.bfloat16, 4), (torch.float32, 3)])
def test_few_queries_want_more_blocks(dtype, splits, emulated):
    """What splits the keys knows for which kernel: 768 blocks of the one, 512 of the other; one of each row merges."""
    q, k, v = (torch.randn(1, 200, n, 8).to(dtype) for n in (1, 512, 512))
    before = emulated.launched_blocks()
    F.attention(q, k, v)
    assert emulated.launched_blocks() - before == 200 * splits + 200


def test_values_that_few_queries_do_not_see(emulated):
    """NaN in keys and values of one warp's part, seen by the last query alone."""
    q, k, v = (torch.randn(1, 2, n, 64).bfloat16() for n in (4, 200, 200))
    expected = F.attention(q[:, :, :3], k[:, :, :199], v[:, :, :199], causal="lower_right")
    k[:, :, 199], v[:, :, 199] = torch.nan, torch.inf
    out = F.attention(q, k, v, causal="lower_right")
    assert torch.isnan(out[:, :, 3]).all()
    torch.testing.assert_close(out[:, :, :3], expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_does_not_show_in_a_merge(dtype, emulated):
    """More splits than there are warps and lanes to add them."""
    q, k, v = (torch.randn(1, heads, n, 8).to(dtype) for heads, n in ((4, 1), (1, 4400), (1, 4400)))
    lengths = torch.tensor([4231], dtype=torch.int32)
    expected = F.attention(q, k, v, key_lengths=lengths, sinks=torch.ones(4), return_lse=True)
    for seed in (1, 2, 3):
        emulated.set_seed(seed)
        actual = F.attention(q, k, v, key_lengths=lengths, sinks=torch.ones(4), return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    golden = reference.attention(*(t.double() for t in (q, k, v)), key_lengths=lengths, sinks=torch.ones(4).double())
    same = reference.attention(q, k, v, key_lengths=lengths, sinks=torch.ones(4))
    assert_close(expected[0], golden, same)


def test_sum_over_many_that_share_a_bias(emulated):
    """Few entries for many batches and heads: several sums, added in order."""
    case = Case("", (6, 4, 4, 20, 30, 16, 16), bias=(1, 1, 20, 30))
    for dtype in (torch.float32, torch.bfloat16):
        qkv, options = tensors(case, dtype)
        cotangents = torch.randn(6, 4, 20, 16), torch.randn(6, 4, 20)
        golden = gradients(reference.attention, *in_dtype(qkv, options, torch.float64, True), cotangents)
        same = list(zip(*yardsticks(qkv, options, cotangents, dtype), strict=True))
        actual = gradients(F.attention, *in_dtype(qkv, options, dtype, True), cotangents)
        assert_gradient_close(actual[1][3], golden[1][3], farther(same[5], golden[1][3]))


def test_errors(emulated):
    wide = torch.randn(1, 1, 4, 257)
    with pytest.raises(RuntimeError, match="head dimensions up to 256 on CUDA, got 257"):
        F.attention(wide, wide, wide)


def test_gradcheck(emulated):
    q, k, v = (torch.randn(1, 2, n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 7, 7))
    bias = torch.randn(1, 1, 4, 7, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, bias, sinks):
        options = {"softcap": 2.0, "causal": "lower_right", "dropout_p": 0.2, "dropout_seed": 3}
        return F.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **options)

    assert torch.autograd.gradcheck(run, (q, k, v, bias, sinks))


def test_tiles_without_a_key(emulated):
    """Queries are still being copied when such a tile has nothing left to do; rare orders of threads show it."""
    q, k, v = (torch.randn(9, heads, 33, 24, dtype=torch.float64) for heads in (6, 3, 3))
    for seed in range(6):
        emulated.set_seed(seed)
        out, lse = F.attention(q, k, v, key_lengths=torch.zeros(9, dtype=torch.int32), return_lse=True)
        assert out.eq(0).all() and lse.eq(-torch.inf).all()
