"""Random calls: shapes, strides, masks and dtypes drawn by hypothesis, against the reference."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close, yardstick_dtype

from tformer_ext import functional as F
from tformer_ext import reference

dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
sizes = st.integers(1, 40)


@st.composite
def strided(draw, shape, dtype):
    """A random tensor whose first three dimensions lie in memory in any order, cut out of a larger one."""
    order = draw(st.permutations(range(3)))
    extra = draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    size = [n + e for n, e in zip(shape, extra, strict=True)]
    base = torch.randn([size[d] for d in (*order, 3)], dtype=torch.float64).to(dtype)
    whole = base.permute(*[order.index(d) for d in range(3)], 3)
    return whole[tuple(slice(e, e + n) for n, e in zip(shape, extra, strict=True))]


@st.composite
def calls(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(dtypes)
    B, Hk, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    Sq, Sk, D, Dv = draw(sizes), draw(st.integers(0, 150)), draw(sizes), draw(sizes)
    H = Hk * group
    qkv = [draw(strided(s, dtype)) for s in ((B, H, Sq, D), (B, Hk, Sk, D), (B, Hk, Sk, Dv))]
    options = {"causal": draw(st.sampled_from([False, True, "upper_left", "lower_right"]))}
    if draw(st.booleans()):
        options["window"] = (draw(st.integers(-1, 30)), draw(st.integers(-1, 30)))
    full = (B, H, Sq, Sk)
    for name in ("bias", "mask"):
        if draw(st.booleans()):
            shape = [n if draw(st.booleans()) else 1 for n in full][draw(st.integers(0, 3)) :]
            options[name] = torch.randn(shape, dtype=dtype) if name == "bias" else torch.rand(shape) > 0.5
    if draw(st.booleans()):
        options["key_lengths"] = torch.randint(0, Sk + 1, (B,))
    if draw(st.booleans()):
        options["sinks"] = torch.randn(H, dtype=dtype)
    if draw(st.booleans()):
        options["softcap"] = draw(st.floats(0.5, 50.0))
    if draw(st.booleans()):
        options |= {"dropout_p": draw(st.floats(0.0, 1.0)), "dropout_seed": draw(st.integers(-(2**63), 2**63 - 1))}
    return qkv, options


def as_dtype(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_attention(call):
    qkv, options = call
    out, lse = F.attention(*qkv, **options, return_lse=True)
    results = {}
    for dtype in (torch.float64, yardstick_dtype(out.dtype)):
        tensors = [t.to(dtype) for t in qkv]
        keywords = {k: as_dtype(v, dtype) for k, v in options.items()}
        results[dtype] = reference.attention(*tensors, **keywords, return_lse=True)
    same = results[yardstick_dtype(out.dtype)]
    # one draw of one yardstick: what it happens to round little is allowed for by the size of the values
    slack = 4 * torch.finfo(out.dtype).eps * (1 + results[torch.float64][0].abs().max() if out.numel() else 1)
    error = (out.double() - results[torch.float64][0]).abs()
    bound = 3 * (same[0].double() - results[torch.float64][0]).abs().max() if out.numel() else 0
    assert torch.equal(torch.isfinite(lse), torch.isfinite(results[torch.float64][1]))
    assert out.numel() == 0 or error.max() <= bound + slack, f"{error.max()} > {bound} + {slack}"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(calls())
def test_attention_gradients_are_finite_and_shaped(call):
    qkv, options = call
    leaves = [t.detach().requires_grad_() for t in qkv]
    keywords = {k: v.requires_grad_() if k in ("bias", "sinks") else v for k, v in options.items()}
    wanted = leaves + [keywords[k] for k in ("bias", "sinks") if k in keywords]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    wide = {k: as_dtype(v.detach(), torch.float64) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    grads = torch.autograd.grad(F.attention(*leaves, **keywords).sum(), wanted)
    golden = torch.autograd.grad(reference.attention(*doubles, **wide).sum(), doubles)
    for g, t in zip(grads, wanted, strict=True):
        assert g.shape == t.shape and g.dtype == t.dtype and torch.isfinite(g).all()
    for g, e in zip(grads, golden, strict=False):
        scale = e.abs().max().item() if e.numel() else 0.0
        # a loose net: the tight bounds are in test_attention.py
        assert g.numel() == 0 or (g.double() - e).abs().max() <= 40 * torch.finfo(g.dtype).eps * (scale + 1) * 8


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(2, 200), dtypes, st.booleans(), st.integers(0, 2**31))
def test_layer_norm(M, N, dtype, with_residual, seed):
    torch.manual_seed(seed)
    x, residual = torch.randn(M, N).to(dtype), torch.randn(M, N).to(dtype)
    weight, bias = torch.randn(N).to(dtype), torch.randn(N).to(dtype)
    residual = residual if with_residual else None
    y = F.residual_layer_norm(x, residual, weight, bias)
    low = yardstick_dtype(dtype)

    def run(kind):
        tensors = [None if t is None else t.to(kind) for t in (x, residual, weight, bias)]
        return reference.residual_layer_norm(*tensors)

    golden = run(torch.float64)
    if dtype in (torch.bfloat16, torch.float16):
        golden = reference.residual_layer_norm(
            (x + residual if with_residual else x).double(), None, weight.double(), bias.double()
        )
    same = run(low).double()
    # a draw in which the yardstick rounds nothing at all still may round in the last place
    same = same + 2 * torch.finfo(low).eps * golden.abs().max()
    assert_close(y, golden, same.to(low))
