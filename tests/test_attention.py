"""attention: values and gradients against the float64 reference, for every case, dtype and instruction set."""

import platform

import pytest
import torch
from cases import CASES, Case, gradients, in_dtype, tensors
from same_maths import yardsticks
from tolerances import DTYPES, assert_close, assert_gradient_close, farther, yardstick_dtype

from tformer_ext import functional as F
from tformer_ext import reference

NAMES = ("query", "key", "value", "bias or sinks", "sinks")


def poison(*shapes_and_dtypes):
    """Leaves NaN in the memory that the next allocations of these sizes are likely to get."""
    for shape, dtype in shapes_and_dtypes:
        torch.full(shape, float("nan"), dtype=dtype)


def dtypes_of(case):
    """All four for the small; the long ones, which differ in ranges only, in two."""
    return DTYPES if case.shape[4] < 2000 else (torch.float32, torch.bfloat16)


def check_values_and_gradients(case, qkv, options, dtype):
    """F.attention of these tensors of dtype, out, lse and all gradients, against float64."""
    B, Hq, _, Sq, _, _, Dv = case.shape
    cotangents = torch.randn(B, Hq, Sq, Dv).to(dtype), torch.randn(B, Hq, Sq)
    golden = gradients(reference.attention, *in_dtype(qkv, options, torch.float64, True), cotangents)
    same = yardsticks(qkv, options, cotangents, yardstick_dtype(dtype))
    leaves, keywords = in_dtype(qkv, options, dtype, True)
    poison(((B, Hq, Sq, Dv), dtype), ((B, Hq, Sq), torch.float32))
    actual = gradients(F.attention, leaves, keywords, cotangents)

    forms = list(zip(*same, strict=True))
    for name, a, g, f in zip(("out", "lse"), actual[0], golden[0], forms[:2], strict=True):
        assert_close(a.detach(), g.detach(), farther(f, g.detach()), f"{dtype} {name}")
    for name, a, g, f in zip(NAMES, actual[1], golden[1], forms[2:], strict=False):
        assert_gradient_close(a, g, farther(f, g), f"{dtype} gradient of {name}")
        assert a.dtype == dtype


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, attention_kernels):
    for dtype in dtypes_of(case):
        torch.manual_seed(1)
        check_values_and_gradients(case, *tensors(case, dtype), dtype)


@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_of_another_dtype(bias_dtype, attention_kernels):
    qkv, options = tensors(Case("", (2, 2, 2, 20, 70, 16, 16), bias=(2, 1, 20, 70)), torch.float32)
    bias = options["bias"].to(bias_dtype).requires_grad_()
    out = F.attention(*qkv, bias=bias)
    golden = reference.attention(*(t.double() for t in qkv), bias=bias.double())
    same = reference.attention(*qkv, bias=bias.float())
    assert_close(out.detach(), golden.detach(), same.detach())
    (gradient,) = torch.autograd.grad(out.square().sum(), bias)
    (expected,) = torch.autograd.grad(golden.square().sum(), bias)
    assert gradient.dtype == bias_dtype
    (yardstick,) = torch.autograd.grad(same.square().sum(), bias)
    # a float64 bias of a float32 attention has a gradient of float32's precision
    computed = torch.float32 if bias_dtype == torch.float64 else bias_dtype
    assert_gradient_close(gradient.to(computed), expected.double(), yardstick.to(computed))


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_most_negative_bias_still_takes_part(dtype, attention_kernels_emulated_too):
    """Masks written as the most negative number leave a fully masked row uniform, as the formula says."""
    q, k, v = (torch.randn(1, 1, 9, 8, dtype=dtype) for _ in range(3))
    bias = torch.zeros(9, 9, dtype=dtype)
    bias[3] = torch.finfo(dtype).min
    out, lse = F.attention(q, k, v, bias=bias, return_lse=True)
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out[0, 0, 3], v[0, 0].mean(0), **close)
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "SBHD"])
def test_output_keeps_the_memory_order_of_query(layout):
    qkv, _ = tensors(Case("", (2, 3, 3, 5, 5, 8, 4), layout=layout), torch.float32)
    out, lse = F.attention(*qkv, return_lse=True)
    order = sorted(range(3), key=lambda d: -qkv[0].stride(d))
    assert sorted(range(3), key=lambda d: -out.stride(d)) == order
    assert out.permute(*order, 3).is_contiguous() and lse.is_contiguous()


@pytest.mark.parametrize("sizes", [(2, 2, 5, 70), (1, 4, 1, 1500), (0, 2, 3, 3)], ids=str)  # the second one in parts
@pytest.mark.parametrize(
    "options", [(), ("causal",), ("mask",), ("bias", "causal"), ("scale",), ("mask", "bias", "scale")], ids="-".join
)
def test_the_short_way_of_plain_calls_gives_the_same_bits(sizes, options, attention_kernels_emulated_too):
    """A call with few options skips the checks, and one without options and gradient the statistics too."""
    B, H, L, S = sizes
    q, k, v = (torch.randn(B, H, n, 16) for n in (L, S, S))
    have = {"causal": "lower_right", "mask": torch.rand(L, S) > 0.3, "bias": torch.randn(H, L, S), "scale": 0.3}
    keywords = {name: have[name] for name in options}
    expected = F.attention(q, k, v, return_lse=True, **keywords)[0]
    poison(((B, H, L, 16), torch.float32))
    assert torch.equal(F.attention(q, k, v, **keywords), expected)
    assert torch.equal(F.attention(q.requires_grad_(), k, v, **keywords), expected)


@pytest.mark.parametrize("shape", [(0, 2, 2, 5, 7, 8, 8), (2, 2, 2, 0, 7, 8, 8), (2, 2, 2, 5, 0, 8, 8)], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_empty(shape, sinks, attention_kernels_emulated_too):
    qkv, options = tensors(Case("", shape, sinks=sinks, bias=(1, 2, 1, 1)), torch.float32)
    leaves, options = in_dtype(qkv, options, torch.float32, True)
    out, lse = F.attention(*leaves, **options, return_lse=True)
    B, H, _, Sq, Sk, _, Dv = shape
    assert out.shape == (B, H, Sq, Dv)
    if Sk == 0:
        assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.full_like(lse, -torch.inf))
    grads = torch.autograd.grad(out.sum() + torch.where(lse == -torch.inf, 0, lse).sum(), [*leaves, *options.values()])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_dead_rows_are_zero_with_zero_gradients(attention_kernels_emulated_too):
    for dtype in DTYPES:
        q, k, v = (torch.randn(1, 2, 70, 16, dtype=dtype, requires_grad=True) for _ in range(3))
        mask = torch.ones(70, 70, dtype=torch.bool)
        mask[10:20] = False
        mask[:, 64:] = False
        bias = torch.zeros(70, 70, dtype=dtype)
        bias[30] = -torch.inf
        out, lse = F.attention(q, k, v, mask=mask, bias=bias, return_lse=True)
        dead = [*range(10, 20), 30]
        assert out[:, :, dead].eq(0).all() and lse[:, :, dead].eq(-torch.inf).all()
        assert torch.isfinite(lse[:, :, [0, 21, 69]]).all()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(torch.isfinite(g).all() for g in grads)
        assert grads[0][:, :, dead].eq(0).all()
        assert grads[1][:, :, 64:].eq(0).all() and grads[2][:, :, 64:].eq(0).all()


@pytest.mark.parametrize("value", [1.0, torch.inf])  # all finite, or not
def test_gradients_where_a_mask_hides_what_would_have_come_last(value, attention_kernels):
    """Blocks of keys and queries that only some heads of a group see; gradients wait for them in vain."""
    shapes = [(1, 4, 200, 20), (1, 2, 200, 20), (1, 2, 200, 20)]
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = torch.ones(4, 200, 200, dtype=torch.bool)
    mask[1, :, 64:] = False  # keys, from the last head of a group
    mask[2, 96:, 128:192] = False
    mask[:, :, 192:] = False
    with torch.no_grad():
        leaves[2][0, 0, 195, 3] = value  # hidden
    cotangent = torch.randn(1, 4, 200, 20, dtype=torch.float64)
    for options in ({"mask": mask}, {"mask": mask, "causal": True}, {"mask": mask, "window": (70, 30)}):
        actual = torch.autograd.grad(F.attention(*leaves, **options), leaves, cotangent)
        expected = torch.autograd.grad(reference.attention(*leaves, **options), leaves, cotangent)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("queries, keys", [(150, 150), (3, 1100)])  # more than one block of keys on every path; parts
def test_non_finite_inputs_reach_exactly_what_the_formula_says(
    dtype, where, bad, queries, keys, attention_kernels_emulated_too
):
    leaves = [torch.randn(1, 1, n, 32).to(dtype) for n in (queries, keys, keys)]
    bad_row = leaves[("query", "key", "value").index(where)][0, 0, :51][-1]
    bad_row[3] = bad
    leaves = [t.requires_grad_() for t in leaves]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    mask = torch.rand(queries, keys) > 0.5
    mask[-2:, 50] = torch.tensor([True, False])
    for options in ({}, {"mask": mask}):
        options["causal"] = "lower_right"
        out = F.attention(*leaves, **options)
        golden = reference.attention(*doubles, **options)
        hit = ~torch.isfinite(golden)
        assert hit.any() and torch.equal(~torch.isfinite(out), hit)
        grads = torch.autograd.grad(out.sum(), leaves)
        expected = torch.autograd.grad(golden.sum(), doubles)
        for name, g, e in zip(NAMES, grads, expected, strict=False):
            assert torch.equal(~torch.isfinite(g), ~torch.isfinite(e)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hidden_garbage_reaches_nothing(dtype, attention_kernels_emulated_too):
    """What padding holds does not matter, not even NaN."""
    q, k, v = (torch.randn(2, 2, 130, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    lengths = torch.tensor([130, 77])
    clean = F.attention(q, k, v, key_lengths=lengths)
    clean_grads = torch.autograd.grad(clean.sum(), (q, k, v))
    dirty_k, dirty_v = k.detach().clone(), v.detach().clone()
    dirty_k[1, :, 77:], dirty_v[1, :, 77:] = float("nan"), float("inf")
    dirty_k.requires_grad_(), dirty_v.requires_grad_()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
    for keywords in ({"key_lengths": lengths}, {"mask": (torch.arange(130) < lengths[:, None])[:, None, None]}):
        out = F.attention(q, dirty_k, dirty_v, **keywords)
        torch.testing.assert_close(out, clean, **close)
        for a, b in zip(torch.autograd.grad(out.sum(), (q, dirty_k, dirty_v)), clean_grads, strict=True):
            torch.testing.assert_close(a, b, **close)


def test_large_scores_do_not_overflow(attention_kernels):
    for dtype in DTYPES[1:]:
        q, k, v = (torch.randn(1, 1, 70, 16).to(dtype) for _ in range(3))
        out = F.attention(q * 100, k, v, scale=10.0)
        golden = reference.attention((q * 100).double(), k.double(), v.double(), scale=10.0)
        assert_close(out, golden, reference.attention(q * 100, k, v, scale=10.0))


@pytest.mark.parametrize("width", [3, 64])
@pytest.mark.parametrize(
    "queries, keys, keywords",
    [
        (20, 2200, {}),  # several ranges of keys, of many panels, and a last tile of two rows
        (200, 200, {"causal": True}),
        (200, 150, {"window": (10, 0)}),  # rows that see keys before rows that see none
        (40, 50, {}),  # one panel
    ],
)
def test_scores_that_rise_along_many_panels(queries, keys, keywords, width, attention_kernels):
    """Scores grow along the keys, now and then by more than the softmax lets pass without a new maximum."""
    for dtype in DTYPES[1:]:
        q, k, v = (torch.randn(2, 2, n, width) for n in (queries, keys, keys))
        k *= 1 + torch.arange(keys)[:, None] // 64 % 7 * 4
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        golden = reference.attention(q.double(), k.double(), v.double(), **keywords)
        assert_close(F.attention(q, k, v, **keywords), golden, reference.attention(q, k, v, **keywords))


# Whole and partial row tiles, key blocks, stretches of keys and strips of values, where tile registers have them.
TILE_CASES = [
    Case("five strips", (1, 2, 1, 75, 715, 64, 130)),
    Case("one strip and a half", (2, 1, 1, 33, 400, 72, 48), {"causal": "lower_right"}),
    Case("half a strip", (1, 2, 2, 17, 330, 33, 9), {"window": (150, 3)}),
    Case("eight strips", (1, 1, 1, 64, 900, 96, 256), {"scale": 0.5}),
    Case("window of stretches", (1, 2, 1, 420, 420, 128, 64), {"window": (170, 20)}, layout="BSHD"),
    Case("causal tall", (1, 1, 1, 500, 450, 64, 64), {"causal": True}, sinks=True),
    Case("rising", (1, 2, 2, 70, 640, 32, 32), {"scale": 4.0}),
    Case("lengths", (3, 2, 2, 40, 300, 64, 96), {"key_lengths": [300, 65, 129]}),
    Case("masked blocks", (1, 2, 1, 50, 600, 64, 64), mask=(1, 1, 1, 600)),
    Case("masked blocks by query", (1, 2, 1, 50, 600, 64, 64), {"causal": "lower_right"}, mask=(1, 1, 50, 600)),
    Case(
        "masked blocks, dropout", (1, 2, 1, 50, 600, 64, 64), {"dropout_p": 0.3, "dropout_seed": 5}, mask=(1, 1, 1, 600)
    ),
]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", TILE_CASES, ids=str)
def test_partial_tiles(case, dtype, isa_of_attention):
    qkv, options = tensors(case, dtype)
    if case.mask:
        options["mask"][..., 64:384] = False
    check_values_and_gradients(case, qkv, options, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_too_large_to_be_scaled_before_the_largest_is_subtracted(dtype, isa_of_attention):
    q, k, v = (torch.randn(1, 2, 70, 64).to(dtype) for _ in range(3))
    q, k = 3e7 * q, 3e7 * k
    out = F.attention(q, k, v, causal=True)
    golden = reference.attention(*(t.double() for t in (q, k, v)), causal=True)
    assert_close(out, golden, reference.attention(q, k, v, causal=True))


def test_sums_over_many_keys(isa_of_attention):
    """Values of one sign, so that a running total is far larger than each term."""
    q, k, v = torch.randn(1, 1, 64, 64), torch.randn(1, 1, 20000, 64), torch.rand(1, 1, 20000, 64) + 1
    golden = reference.attention(q.double(), k.double(), v.double(), scale=0.02)
    assert_close(F.attention(q, k, v, scale=0.02), golden, reference.attention(q, k, v, scale=0.02))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_each_other(dtype, isa_of_attention):
    """A row whose scores rise along the keys takes another way than its neighbours in a tile; their bits stay."""
    q, k, v = (torch.randn(1, 2, n, 64).to(dtype) for n in (70, 600, 600))
    k *= torch.linspace(0.1, 2, 600)[:, None].to(dtype)
    calm = q.clone()
    q[:, :, [3, 40, 69]] *= 30
    others = [i for i in range(70) if i not in (3, 40, 69)]
    for options in ({}, {"causal": "lower_right"}):
        for t, e in zip(*(F.attention(x, k, v, **options, return_lse=True) for x in (q, calm)), strict=True):
            assert torch.equal(t[:, :, others], e[:, :, others])
            assert not torch.equal(t[:, :, 3], e[:, :, 3])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="as the CPU does it")
def test_weights_below_the_normal_numbers_are_zero(isa_of_attention):
    """A product with one takes some CPUs many times as long."""
    q, k, v = torch.ones(1, 1, 40, 4), torch.zeros(1, 1, 200, 4), torch.zeros(1, 1, 200, 4)
    k[:, :, 50:] = -22.5  # weights of e^-90, 8e-40
    v[:, :, 50:] = 1e30
    v.requires_grad_()
    out = F.attention(q, k, v, scale=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    (gradient,) = torch.autograd.grad(out.sum(), v)
    assert (gradient[:, :, 50:] == 0).all() and (gradient[:, :, :50] != 0).all()


def test_sharp_softmax(isa_of_attention):
    """Most weights are near the smallest normal number, below it or 0."""
    for dtype in DTYPES[1:]:
        case = Case("sharp", (1, 2, 2, 130, 260, 64, 64), {"scale": 3.0, "causal": "lower_right"})
        check_values_and_gradients(case, *tensors(case, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_by_keys_of_any_stride(dtype, isa_of_attention):
    """One that is the same for all queries takes a way of its own: the results are those of key_lengths."""
    q, k, v = (torch.randn(2, 2, n, 32).to(dtype) for n in (40, 200, 200))
    spread = torch.full((2, 1, 1, 400), 7, dtype=torch.uint8).view(torch.bool)  # other bytes than 1 are true, too
    spread[0, ..., ::2] = True
    spread[1, ..., ::2] = torch.arange(200) < 77
    lengths = F.attention(q, k, v, key_lengths=torch.tensor([200, 77]))
    assert torch.equal(F.attention(q, k, v, mask=spread[..., ::2]), lengths)
    assert torch.equal(F.attention(q, k, v, mask=spread[..., ::2].contiguous()), lengths)


@pytest.mark.parametrize("dtype", DTYPES[1:3])
def test_lowest_number_as_a_mask(dtype, isa_of_attention):
    """As models write it. A row that it hides whole sees all keys alike, and without a gradient it disturbs nothing."""
    qkv = [torch.randn(2, 2, n, 64).to(dtype) for n in (70, 200, 200)]
    hidden, bias = [3, 40, 69], torch.zeros(2, 1, 70, 200, dtype=dtype)
    bias[..., 130:] = torch.finfo(dtype).min
    bias[:, :, hidden] = torch.finfo(dtype).min
    cotangent = torch.randn(2, 2, 70, 64).to(dtype)
    cotangent[:, :, hidden] = 0

    def run(function, to):
        leaves = [t.to(to).requires_grad_() for t in qkv]
        out = function(*leaves, bias=bias.to(to))
        return out.detach(), torch.autograd.grad(out, leaves, cotangent.to(to))

    actual, golden = run(F.attention, dtype), run(reference.attention, torch.float64)
    same = run(reference.attention, dtype)
    # log-sum-exp, from which the reference has its weights, has no place for the number of keys beside such scores
    golden[0][:, :, hidden] = qkv[2].double().mean(2, keepdim=True)
    same[0][:, :, hidden] = qkv[2].mean(2, keepdim=True)
    assert_close(actual[0], golden[0], same[0])
    for name, a, g, s in zip(NAMES, actual[1], golden[1], same[1], strict=False):
        assert_gradient_close(a, g, s, name)
