"""Backward attention for sm_90a, run by the emulation: values, which calls it takes, and that no order of blocks,
threads, copies and products shows."""

import pytest
import torch
from cases import CASES, gradients, in_dtype
from hopper_cases import BACKWARD_CASES, DTYPES, backward_inputs, check_gradients
from same_maths import yardsticks
from tolerances import assert_close, assert_gradient_close, farther

from tformer_ext import functional as F
from tformer_ext import reference
from tformer_ext.explain import hopper_refusals
from tformer_ext.ops import attention


@pytest.fixture
def backward(hopper, monkeypatch):
    """boxes(): those that the copy engine has moved in backward calls, which are then those of sm_90a."""
    moved, run = [0], attention._backward

    def watched(*arguments, **options):
        before = hopper.moved_boxes()
        results = run(*arguments, **options)
        moved[0] += hopper.moved_boxes() - before
        return results

    monkeypatch.setattr(attention, "_backward", watched)
    hopper.boxes = lambda: moved[0]
    return hopper


RACES = ("several tiles", "several tiles causal", "eight heads of queries", "window over several tiles", "dead rows",
         "key lengths", "causal 64", "window left only", "dropout 64", "dropout, window", "wide several tiles",
         "wide several tiles causal", "wide eight heads of queries", "wide window over several tiles",
         "wide key lengths", "bias over several tiles", "bias over several tiles causal")  # fmt: skip
MOST = [c for c in BACKWARD_CASES if c.name in RACES]
IN_DTYPES = [(c, torch.bfloat16) for c in BACKWARD_CASES] + [(c, torch.float16) for c in MOST]


@pytest.mark.parametrize("case, dtype", IN_DTYPES, ids=str)
def test_gradients(case, dtype, backward):
    check_gradients(case, dtype)
    nothing = "all keys hidden" in case.name
    assert (backward.boxes() > 0) != (nothing or is_shared(case))


def is_shared(case):
    """Whether several pairs share an entry of the bias, so that its gradient is for the portable kernels."""
    return case.bias is not None and (case.bias != (*case.shape[:2], *case.shape[3:5]) or case.bias[2] == 1)


@pytest.mark.parametrize("case", [c for c in BACKWARD_CASES if c.bias], ids=str)
def test_gradients_beside_a_constant_bias(case, backward):
    """Which may be shared. Where it has a gradient of its own, those of the others have the same bits with it."""
    qkv, options, cotangents = backward_inputs(case, torch.bfloat16)

    def run(to, of_bias):
        leaves, operands = in_dtype(qkv, options, to, True)
        operands["bias"].requires_grad_(of_bias)
        results = F.attention(*leaves, **operands, return_lse=True)
        total = sum((r * c.to(r.dtype)).sum() for r, c in zip(results, cotangents, strict=True))
        return torch.autograd.grad(total, leaves)

    actual = run(torch.bfloat16, False)
    assert backward.boxes() > 0
    golden = gradients(reference.attention, *in_dtype(qkv, options, torch.float64, True), cotangents)[1]
    same = list(zip(*yardsticks(qkv, options, cotangents, torch.bfloat16), strict=True))[2:]
    for name, a, g, f in zip(("query", "key", "value"), actual, golden, same, strict=False):
        assert_gradient_close(a, g, farther(f, g), name)
    if not is_shared(case):
        for a, b in zip(actual, run(torch.bfloat16, True), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_gradient_of_a_bias_where_values_are_not_finite(bad, backward):
    """Of hidden pairs it is 0 all the same: by position, by length, by -inf."""
    q, k, v = (torch.randn(1, 2, 150, 64).bfloat16() for _ in range(3))
    bias = torch.randn(1, 2, 150, 150).bfloat16()
    bias[..., 90:100] = -float("inf")
    k[:, :, 100:], v[:, :, 90:, 5] = bad, bad
    bias.requires_grad_()
    for options in ({"key_lengths": torch.tensor([100], dtype=torch.int32)}, {"causal": True}):
        hidden = 90 if options.get("key_lengths") is not None else 0
        (grad,) = torch.autograd.grad(F.attention(q, k, v, bias=bias, **options).float().nan_to_num().sum(), bias)
        assert backward.boxes() > 0
        assert not grad[..., hidden:].any() if hidden else not grad.triu(1).any()


TAKEN = ("several key ranges", "causal lower right tall has dead rows", "causal upper left wide", "window causal",
         "window of one key", "one element", "sinks", "one past the tiles", "grouped queries")  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.name in TAKEN], ids=str)
def test_gradients_of_the_cases_of_all_kernels(case, backward):
    check_gradients(case, torch.bfloat16)


def bits(case, dtype):
    """The gradients, as bytes."""
    qkv, options, cotangents = backward_inputs(case, dtype)
    grads = gradients(F.attention, *in_dtype(qkv, options, dtype, True), cotangents)[1]
    return [g.contiguous().view(torch.uint8) for g in grads]


@pytest.mark.parametrize("case", MOST, ids=str)
def test_order_does_not_show(case, backward):
    """Of blocks and how many run at a time, of warps and lanes, of when copies read and land."""
    expected = bits(case, torch.bfloat16)
    assert backward.boxes() > 0
    for seed in range(1, 9):
        backward.set_seed(seed)
        backward.set_poison(nan=seed % 2 == 0)  # a NaN could be repaired
        for n, (a, b) in enumerate(zip(bits(case, torch.bfloat16), expected, strict=True)):
            assert torch.equal(a, b), f"gradient {n} with seed {seed}"


DROPOUT = {"causal": True, "dropout_p": 0.2, "dropout_seed": 5}
LENGTHS = [(5, 200, 0, 130, 1, 64), (70, 9, 3, 230, 0, 300)]  # of queries, of keys


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": "lower_right", "window": (40, -1)}, DROPOUT], ids=str)
def test_packed_sequences(dtype, options, D, backward):
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in LENGTHS)
    q, k, v = (torch.randn(int(cu[-1]), h, D).to(dtype) for cu, h in ((cu_q, 4), (cu_k, 2), (cu_k, 2)))
    cotangent = torch.randn(len(q), 4, D).to(dtype)

    def run(function, to):
        leaves = [t.to(to).requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(function(*leaves, cu_q, cu_k, **options), leaves, cotangent.to(to))

    actual = run(F.attention_varlen, dtype)
    assert backward.boxes() > 0
    golden, same = run(reference.attention_varlen, torch.float64), run(reference.attention_varlen, dtype)
    for name, a, g, f in zip(("query", "key", "value"), actual, golden, same, strict=True):
        assert_close(a, g, f, name)
    for seed in (1, 2, 3):
        backward.set_seed(seed)
        for a, b in zip(run(F.attention_varlen, dtype), actual, strict=True):
            assert torch.equal(a, b), f"with seed {seed}"


@pytest.mark.parametrize("D", [64, 128, 136, 256])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_cotangents_reach_what_their_row_saw(bad, D, backward):
    leaves = [torch.randn(1, 1, 200, D).bfloat16().requires_grad_() for _ in range(3)]
    cotangent = torch.randn(1, 1, 200, D).bfloat16()
    cotangent[0, 0, 50, 3] = bad
    out = F.attention(*leaves, causal=True)
    dq, dk, dv = (~torch.isfinite(g[0, 0]) for g in torch.autograd.grad(out, leaves, cotangent))
    assert backward.boxes() > 0
    position = torch.arange(200).unsqueeze(1)
    assert torch.equal(dq, (position == 50).expand(200, D))
    assert torch.equal(dk, (position <= 50).expand(200, D))
    assert torch.equal(dv, (position <= 50) & (torch.arange(D) == 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hidden_keys_and_values_that_are_not_finite(bad, backward):
    """By length, and in the sequence that follows: they reach nothing. Beyond, keys have zero gradients."""
    q, k, v = (torch.randn(1, 2, 150, 64).bfloat16() for _ in range(3))
    clean = [t.clone() for t in (q, k, v)]
    k[:, :, 100:], v[:, :, 100:, 5] = bad, bad
    lengths, cu = (torch.tensor(n, dtype=torch.int32) for n in ([100], [0, 100, 150]))
    cotangent = torch.randn(1, 2, 150, 64).bfloat16()

    def run(tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        padded = torch.autograd.grad(F.attention(*leaves, key_lengths=lengths), leaves, cotangent)
        packed = [t[0].transpose(0, 1) for t in leaves]
        of_packed = torch.autograd.grad(
            F.attention_varlen(*packed, cu, cu)[:100], leaves, cotangent[0].transpose(0, 1)[:100]
        )
        return padded, [g[:, :, :100] for g in of_packed]

    for expected, actual in zip(run(clean), run((q, k, v)), strict=True):
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)
    assert not run((q, k, v))[0][1][:, :, 100:].any()


def why(query, key, value, **options):
    """The name of the reason for which backward does not go to the kernels of sm_90a; None: it does."""
    _, refused = hopper_refusals(torch.ops.tformer_emulated._attention_refusals, query, key, value, options)
    return refused and refused[0]


def test_what_goes_to_the_portable_kernels(backward):
    from emulation.library import AMPERE, HOPPER

    q, wide = torch.randn(1, 2, 70, 64).bfloat16(), torch.randn(1, 2, 70, 136).bfloat16()
    long, few = torch.randn(1, 2, 600, 64).bfloat16(), torch.randn(1, 2, 3, 64).bfloat16()
    assert why(q, q, q) is None and why(few, long, long) is None
    assert why(q, q, q, causal=True, window=(5, -1), key_lengths=torch.tensor([9]), sinks=torch.ones(2)) is None
    assert why(q.float(), q.float(), q.float()) == "dtype"
    assert why(q, q, q, softcap=1.0) == why(q, q, q, bias=torch.zeros(70, 71).bfloat16()[:, 1:]) == "operands"
    for shape, taken in (((2, 70, 70), True), ((70, 70), False), ((2, 1, 70), False)):
        bias = torch.zeros(shape).bfloat16()
        assert why(q, q, q, bias=bias) is None
        assert why(q, q, q, bias=bias.requires_grad_()) == (None if taken else "operands")
    assert why(q, q, q, dropout_p=0.5) is None
    assert why(q, q, q, mask=torch.ones(1, 1, 1, 70).bool()) is None
    assert why(q, q, q, mask=torch.ones(2, 1, 70).bool()) == "operands"
    assert why(wide, wide, wide) is None and why(q, q, wide) is None
    assert why(q[..., 1:], q[..., 1:], q) == "layout"
    assert why(q[:, :, :0], q, q) == why(q, q[:, :, :0], q[:, :, :0]) == "layout"
    hopper = backward
    hopper.set_device(HOPPER, hopper_kernels=False)
    assert why(q, q, q) == "not_wanted"
    hopper.set_device(AMPERE, hopper_kernels=True)
    assert why(q, q, q) == "device"


@pytest.mark.parametrize("shape", [(1, 1, 70, 65), (1, 2, 70, 135)])
def test_refused_calls_are_right_all_the_same(shape, backward):
    leaves = [torch.randn(shape).bfloat16().requires_grad_() for _ in range(3)]
    cotangent = torch.randn(shape).bfloat16()
    actual = torch.autograd.grad(F.attention(*leaves), leaves, cotangent)
    assert backward.boxes() == 0
    wide = [t.detach().double().requires_grad_() for t in leaves]
    for a, g in zip(actual, torch.autograd.grad(reference.attention(*wide), wide, cotangent.double()), strict=True):
        torch.testing.assert_close(a.double(), g, rtol=3e-2, atol=3e-2)


def test_a_cotangent_of_any_strides(backward):
    """Expanded, and of rows that do not begin at multiples of 16 bytes: the portable kernels."""
    leaves = [torch.randn(1, 2, 70, 64).bfloat16().requires_grad_() for _ in range(3)]
    out = F.attention(*leaves)
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    boxes = backward.boxes()
    assert boxes > 0
    for odd in (torch.ones(1, 1, 1, 64).bfloat16().expand(1, 2, 70, 64), torch.ones(1, 2, 70, 65).bfloat16()[..., 1:]):
        for a, b in zip(torch.autograd.grad(out, leaves, odd, retain_graph=True), ones, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)
    assert backward.boxes() == boxes


def test_nothing_to_do(backward):
    for Sq, Sk, B in ((70, 9, 0), (0, 9, 2), (70, 0, 2)):
        leaves = [torch.randn(B, 2, S, 64).bfloat16().requires_grad_() for S in (Sq, Sk, Sk)]
        for grad, leaf in zip(torch.autograd.grad(F.attention(*leaves).sum(), leaves), leaves, strict=True):
            assert grad.shape == leaf.shape and not grad.any()


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("sm90", [True, False])
def test_a_mask_of_padding_is_key_lengths(D, sm90, backward):
    """Tiles that a mask by keys hides whole, in part and not at all, with what they hold beyond."""
    from emulation.library import AMPERE, HOPPER

    backward.set_device(HOPPER if sm90 else AMPERE, hopper_kernels=sm90)
    lengths = torch.tensor([300, 128, 5])
    mask = (torch.arange(300) < lengths.view(-1, 1)).view(3, 1, 1, 300)
    q, k, v = (torch.randn(3, 2, S, D).bfloat16().requires_grad_() for S in (140, 300, 300))
    cotangent = torch.randn(3, 2, 140, D).bfloat16()
    results = []
    for options in ({"mask": mask}, {"key_lengths": lengths}):
        out, lse = F.attention(q, k, v, return_lse=True, **options)
        results.append([out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), cotangent)])
    for name, a, b in zip(("out", "lse", "query", "key", "value"), *results, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2, msg=name)
