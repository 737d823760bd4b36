"""Forward attention for sm_90a, run by the emulation: values, which calls they take, and that no order of threads,
copies and products shows."""

import pytest
import torch
from cases import CASES, tensors
from hopper_cases import DTYPES, HOPPER_CASES, check_values
from tolerances import assert_close

from tformer_ext import functional as F
from tformer_ext import reference
from tformer_ext.explain import _cuda_kernels, hopper_refusals


def why(query, key, value, **options):
    """The name of the reason for which a call does not go to the kernels of sm_90a; None: it does."""
    refused, _ = hopper_refusals(torch.ops.tformer_emulated._attention_refusals, query, key, value, options)
    return refused and refused[0]


@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(case, dtype, hopper):
    before = hopper.moved_boxes()
    check_values(case, dtype)
    assert hopper.moved_boxes() > before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_of_the_cases_of_all_kernels(case, hopper):
    check_values(case, torch.bfloat16)


RACES = (
    "all keys 64",
    "causal 128",
    "window 256",
    "dead rows",
    "key lengths",
    "many key tiles",
    "whole tiles",
    "dropout 128",
    "bias 128",
)


@pytest.mark.parametrize("case", [c for c in HOPPER_CASES if c.name in RACES], ids=str)
def test_order_does_not_show(case, hopper):
    """Of blocks, warps and lanes, and of when copies land."""
    qkv, options = tensors(case, torch.bfloat16)
    expected = F.attention(*qkv, **options, return_lse=True)
    for seed in range(1, 6):
        hopper.set_seed(seed)
        hopper.set_poison(nan=seed % 2 == 0)  # a NaN could be repaired
        for a, b in zip(F.attention(*qkv, **options, return_lse=True), expected, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"with seed {seed}"


LENGTHS = [(5, 200, 0, 130, 1), (70, 9, 3, 230, 0)]  # of queries, of keys


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": "lower_right", "window": (40, -1)}], ids=str)
def test_packed_sequences(dtype, options, hopper):
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in LENGTHS)
    q, k, v = (torch.randn(int(cu[-1]), h, 64).to(dtype) for cu, h in ((cu_q, 4), (cu_k, 2), (cu_k, 2)))

    def run(function, to):
        return function(*(t.to(to) for t in (q, k, v)), cu_q, cu_k, **options, return_lse=True)

    before = hopper.moved_boxes()
    actual = run(F.attention_varlen, dtype)
    assert hopper.moved_boxes() > before
    for a, g, f in zip(actual, run(reference.attention_varlen, torch.float64), run(reference.attention_varlen, dtype),
                       strict=True):  # fmt: skip
        assert_close(a, g, f)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hidden_values_that_are_not_finite(bad, hopper):
    """By position, by length, and in the sequence that follows; a visible one reaches the rows that see it."""
    q, k, v = (torch.randn(1, 2, 150, 64).bfloat16() for _ in range(3))
    v[:, :, 100:, 5] = bad
    out = F.attention(q, k, v, causal=True)
    seen = torch.zeros(150, 64, dtype=torch.bool)
    seen[100:, 5] = True
    assert torch.equal(~torch.isfinite(out[0, 1]), seen)
    lengths = torch.tensor([100], dtype=torch.int32)
    assert torch.isfinite(F.attention(q, k, v, key_lengths=lengths)).all()
    cu = torch.tensor([0, 100, 150], dtype=torch.int32)
    packed = F.attention_varlen(*(t[0].transpose(0, 1) for t in (q, k, v)), cu, cu)
    assert torch.isfinite(packed[:100]).all() and not torch.isfinite(packed[100:, :, 5]).any()
    k[:, :, 3] = bad
    assert torch.isnan(F.attention(q, k, v.clamp(-9, 9).nan_to_num(0), causal=True)[:, :, 3:]).all()


def one_head(bias, hopper, **options):
    """Of a call with this bias, that of the kernels for sm_90a: inputs and out."""
    qkv = [torch.randn(1, 2, S, 64).bfloat16() for S in (bias.shape[-2], bias.shape[-1], bias.shape[-1])]
    assert why(*qkv, bias=bias, **options) is None
    return qkv, F.attention(*qkv, bias=bias, **options)


@pytest.mark.parametrize("Sk", [99, 127, 129])
def test_a_bias_of_odd_length(Sk, hopper):
    """Rows begin at even elements; the last pair has one. What lies beyond is not read for a score."""
    bias = torch.full((2, 70, Sk + 3), float("nan")).bfloat16()[..., :Sk]
    bias.copy_(torch.randn(bias.shape))
    qkv, out = one_head(bias, hopper)
    golden, same = (reference.attention(*(t.to(to) for t in qkv), bias=bias.to(to)) for to in (torch.double, out.dtype))
    assert_close(out, golden, same)


@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_that_hides(causal, hopper):
    """-inf as a mask would; of a row that sees nothing else 0. The most negative number: as if it were not seen, but
    where there is nothing else."""
    seen = torch.rand(2, 150, 200) > 0.4
    seen[:, 20:40] = False
    for hidden in (float("-inf"), torch.finfo(torch.bfloat16).min):
        bias = torch.zeros(2, 150, 200).masked_fill(~seen, hidden).bfloat16()
        qkv, out = one_head(bias, hopper, causal=causal)
        masked = F.attention(*qkv, mask=seen, causal=causal)
        rows = (seen & torch.ones(150, 200).tril().bool() if causal else seen).any(-1)
        torch.testing.assert_close(out[0, rows], masked[0, rows], rtol=2e-2, atol=2e-2)
        assert not rows[:, 20:40].any()
        if hidden == float("-inf"):
            assert not out[0, ~rows].any()
        else:
            assert out[0, ~rows].isfinite().all() and out[0, ~rows].any(-1).all()


def test_a_bias_that_is_not_a_number(hopper):
    """Reaches its row; hidden by position it reaches nothing."""
    bias = torch.zeros(2, 150, 150).bfloat16()
    bias[:, 70, 60], bias[:, 20, 60] = float("nan"), float("nan")
    out = one_head(bias, hopper, causal=True)[1]
    assert torch.equal(out[0].isnan(), (torch.arange(150) == 70).view(1, 150, 1).expand(2, -1, 64))


def test_what_goes_to_the_portable_kernels(hopper):
    from emulation.library import AMPERE, HOPPER

    q = torch.randn(1, 2, 70, 64).bfloat16()
    wide = torch.randn(1, 2, 70, 65).bfloat16()
    long, few = torch.randn(1, 2, 600, 64).bfloat16(), torch.randn(1, 2, 3, 64).bfloat16()
    assert why(q, q, q) is None
    assert why(q, q, q, causal=True, window=(5, -1), key_lengths=torch.tensor([9]), sinks=torch.ones(2)) is None
    assert why(q, q, q, mask=torch.ones(1, 1, 1, 70).bool()) is why(q, q, q, mask=torch.ones(2, 1, 70).bool()) is None
    assert why(q.float(), q.float(), q.float()) == "dtype"
    for options in (
        {"softcap": 1.0}, {"scale": -1.0}, {"scale": 0.0}, {"bias": torch.zeros(1, 1, 1, 70)},
        {"alibi_slopes": torch.ones(2)}, {"mask": torch.ones(70, 70).bool()},
    ):  # fmt: skip
        assert why(q, q, q, **options) == "operands"
    bias = torch.zeros(2, 70, 72).bfloat16()
    for taken in (bias[..., :70], bias[:1, :1, :70], bias[..., 2:], bias[:, :1, :70].expand(-1, 70, -1)):
        assert why(q, q, q, bias=taken) is None
        for options in ({"softcap": 1.0}, {"scale": -1.0}, {"alibi_slopes": torch.ones(2)}, {"dropout_p": 0.1}):
            assert why(q, q, q, bias=taken, **options) == "operands"
        assert why(q, q, q, bias=taken, mask=torch.ones(70, 70).bool()) == "operands"
    odd = torch.zeros(2, 70, 71).bfloat16()
    for refused in (bias[..., 1:71], odd[..., :70], bias[..., :1], bias[..., :70].half(), bias[0, :, :70].T):
        assert why(q, q, q, bias=refused) == "operands"
    assert why(q, q, q, dropout_p=0.5) is None
    assert why(few, long, long) == "split"
    one = torch.randn(1, 8, 1, 64).bfloat16()
    assert why(one, long, long) == "split" and why(one, long, long, sinks=torch.ones(8)) == "split"
    assert why(one, long, long, causal="lower_right", window=(200, -1)) is None
    for bad in (wide, wide[..., 1:], q.expand(3, -1, -1, -1)):
        assert why(bad, bad, bad) == "layout"
    assert why(q, q[:, :, :0], q[:, :, :0]) == "layout"
    assert why(q, q, wide[..., :63]) == "layout"
    hopper.set_device(HOPPER, hopper_kernels=False)
    assert why(q, q, q) == "not_wanted"
    before = hopper.moved_boxes()
    F.attention(q, q, q)
    assert hopper.moved_boxes() == before
    hopper.set_device(AMPERE, hopper_kernels=True)
    assert why(q, q, q) == "device"


def test_what_explain_says(hopper, monkeypatch):
    from emulation.library import HOPPER

    operator = torch.ops.tformer_emulated._attention_refusals
    monkeypatch.setattr(torch.ops.tformer_ext, "_attention_refusals", operator, raising=False)
    q, wide = torch.randn(1, 2, 70, 64).half(), torch.randn(1, 2, 70, 136).half()
    by_warpgroups = "tensor cores by warpgroups (wgmma), float16 into float32"
    assert _cuda_kernels(q, q, q, {"causal": True}) == (by_warpgroups, ())
    assert _cuda_kernels(wide, wide, wide, {}) == (by_warpgroups, ())
    product, (note,) = _cuda_kernels(q, q, q, {"mask": torch.ones(1, 2, 1, 70).bool()})
    assert product == by_warpgroups and note.startswith("backward: not the kernels for sm_90a") and "by head" in note
    few, long = torch.randn(1, 2, 3, 64).half(), torch.randn(1, 2, 600, 64).half()
    product, (note,) = _cuda_kernels(few, long, long, {})
    assert product == "tensor cores, float16 into float32" and note.startswith("forward: not the kernels for sm_90a")
    product, (note,) = _cuda_kernels(q, q, q, {"softcap": 2.0})
    assert product == "tensor cores, float16 into float32" and "softcap" in note
    assert _cuda_kernels(q.float(), q.float(), q.float(), {}) == ("tensor cores, float32 in two TF32 slices", ())
    assert _cuda_kernels(q.double(), q.double(), q.double(), {}) == ("float64 multiply-add", ())
    hopper.set_device(HOPPER, hopper_kernels=False)
    assert "TFORMER_EXT_SM90=0" in _cuda_kernels(q, q, q, {})[1][0]


def test_strided_batches_of_one(hopper):
    """A dimension of size 1 may have any stride."""
    q = torch.randn(1, 1, 70, 64).bfloat16().as_strided((1, 1, 70, 64), (0, 7, 64, 1))
    assert why(q, q, q) is None
    torch.testing.assert_close(F.attention(q, q, q), F.attention(*[q.clone(memory_format=torch.contiguous_format)] * 3))


def test_nothing_to_do(hopper):
    q, k = torch.randn(0, 2, 70, 64).bfloat16(), torch.randn(0, 2, 9, 64).bfloat16()
    assert F.attention(q, k, k).shape == (0, 2, 70, 64)
    q, k = torch.randn(2, 2, 0, 64).bfloat16(), torch.randn(2, 2, 9, 64).bfloat16()
    assert F.attention(q, k, k).shape == (2, 2, 0, 64)
