"""Backward attention in one pass over tiles of keys, run by the emulation: several tiles that add to the same sums of
dq, which no order of blocks and threads shows. What each option does: test_attention_cuda.py."""

import pytest
import torch
from cases import Case, gradients, in_dtype
from hopper_cases import BACKWARD_CASES, HOPPER_CASES, backward_inputs, check_gradients

from tformer_ext import functional as F

# Tiles have 64 queries and 128 keys, above width 128 64 keys. Where a block has less shared memory, from width 65 on:
# plain calls up to 128 have tiles of 64 keys, all others go in two passes.
SHARED_BYTES = {"much": 163 << 10, "little": 99 << 10}
NAMES = ("several tiles", "several tiles causal", "eight heads of queries", "keys nobody sees", "all keys hidden",
         "causal window over several tiles", "window left only", "dead rows", "tall upper left", "key lengths",
         "key lengths lower right", "one query of groups", "length first", "mask per key causal",
         "mask per key and head", "dropout of groups", "bias over several tiles", "bias per key", "bias over heads",
         "wide several tiles", "wide several tiles causal", "wide eight heads of queries", "wide key lengths",
         "wide dropout of groups", "wide values narrow", "mask per key wide")  # fmt: skip
KNOWN = {c.name: c for c in HOPPER_CASES + BACKWARD_CASES}
CASES = [KNOWN[name] for name in NAMES] + [
    Case("everything", (2, 4, 2, 150, 300, 72, 96),
         {"causal": "lower_right", "window": (200, -1), "softcap": 5.0, "dropout_p": 0.2, "dropout_seed": 3},
         alibi="H", mask=(2, 1, 150, 300), bias=(2, 4, 150, 300), sinks=True),
    Case("rows that are not aligned", (1, 2, 1, 150, 300, 65, 67), {"causal": True}),
]  # fmt: skip
EACH = [(c, shared) for c in CASES for shared in SHARED_BYTES if shared == "much" or max(c.shape[5:]) > 64]
RACES = ("several tiles", "several tiles causal", "eight heads of queries", "everything", "wide several tiles")


@pytest.mark.parametrize("case, shared", EACH, ids=str)
def test_gradients(case, shared, emulated):
    emulated.set_shared_bytes(SHARED_BYTES[shared])
    check_gradients(case, torch.float16 if case.name in RACES else torch.bfloat16)


def bits(case):
    qkv, options, cotangents = backward_inputs(case, torch.bfloat16)
    grads = gradients(F.attention, *in_dtype(qkv, options, torch.bfloat16, True), cotangents)[1]
    return [g.contiguous().view(torch.uint8) for g in grads]


@pytest.mark.parametrize("case, shared", [e for e in EACH if e[0].name in RACES[: 5 if e[1] == "much" else 3]], ids=str)
def test_order_does_not_show(case, shared, emulated):
    """Of blocks and how many run at a time, of warps and lanes, of when copies land."""
    emulated.set_shared_bytes(SHARED_BYTES[shared])
    expected = bits(case)
    for seed in range(1, 6):
        emulated.set_seed(seed)
        emulated.set_poison(nan=seed % 2 == 0)  # a NaN could be repaired
        for n, (a, b) in enumerate(zip(bits(case), expected, strict=True)):
            assert torch.equal(a, b), f"gradient {n} with seed {seed}"


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_on_a_gpu(case, cuda):
    """On sm_90 with TFORMER_EXT_SM90=0."""
    for dtype in (torch.bfloat16, torch.float16):
        check_gradients(case, dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("case", [c for c in CASES if c.name in RACES], ids=str)
def test_repeats_on_a_gpu_have_the_same_bits(case, cuda):
    expected = bits(case)
    for _ in range(50):
        for a, b in zip(bits(case), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_was_seen(bad, emulated):
    """Rows of dk and dv are made by two warps: one of them may have met nothing."""
    leaves = [torch.randn(1, 1, 300, 128).bfloat16().requires_grad_() for _ in range(3)]
    cotangent = torch.randn(1, 1, 300, 128).bfloat16()
    cotangent[0, 0, 150, 3] = bad
    dq, dk, dv = (
        ~torch.isfinite(g[0, 0]) for g in torch.autograd.grad(F.attention(*leaves, causal=True), leaves, cotangent)
    )
    position = torch.arange(300)
    assert torch.equal(dq, (position == 150).unsqueeze(1).expand(300, 128))
    assert torch.equal(dk, (position <= 150).unsqueeze(1).expand(300, 128))
    assert torch.equal(dv, (position <= 150).unsqueeze(1) & (torch.arange(128) == 3))


def test_order_does_not_show_where_rows_are_computed_anew(emulated):
    q, k, v = (torch.randn(1, 2, 300, 128).bfloat16().requires_grad_() for _ in range(3))
    cotangent = torch.randn(1, 2, 300, 128).bfloat16()
    cotangent[..., 150, 3] = torch.inf

    def run():
        return torch.autograd.grad(F.attention(q, k, v, causal=True), (q, k, v), cotangent)

    expected = run()
    for seed in range(1, 5):
        emulated.set_seed(seed)
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
