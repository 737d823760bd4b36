"""The ops as part of torch: opcheck, compile, export, vmap, func, autocast, checkpointing, meta tensors."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tformer_ext as tx
from tformer_ext import functional as F

OPS = torch.ops.tformer_ext
SEED = torch.tensor(5)


def qkv(B=2, H=2, S=9, D=8, requires_grad=False, dtype=torch.float32):
    return [torch.randn(B, S, H, D, dtype=dtype).transpose(1, 2).detach().requires_grad_(requires_grad) for _ in "qkv"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck_attention(dtype, extras):
    q, k, v = qkv(dtype=dtype)
    operands = [None] * 8
    if extras:
        operands = [
            torch.randn(1, 2, 9, 9), torch.rand(2, 1, 1, 9) > 0.2, torch.rand(2), torch.randn(2),
            torch.tensor([9, 4], dtype=torch.int32), None, None, SEED,
        ]  # fmt: skip
    numbers = (1, 4, -1, 0.3, 2.0, 0.2 if extras else 0.0)
    arguments = (q, k, v, *operands, *numbers)
    opcheck(OPS._attention_forward.default, arguments)
    opcheck(OPS._attention_inference.default, (q, k, v, 1))
    out, lse = OPS._attention_forward(*arguments)
    back = (out, lse, q, k, v, out, lse, *operands, extras, *numbers)
    opcheck(OPS._attention_backward.default, back)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("rms", [False, True])
def test_opcheck_norm(dropout_p, rms):
    x, residual, weight, bias = torch.randn(5, 7), torch.randn(5, 7), torch.randn(7), torch.randn(7)
    arguments = (x, residual, weight, bias, SEED, 1e-5, dropout_p, rms, True, torch.float32)
    opcheck(OPS._residual_norm_forward.default, arguments)
    opcheck(OPS._residual_norm_inference.default, (x, residual, weight, bias, 1e-5, rms))
    y, total, mean, rstd = OPS._residual_norm_forward(*arguments)
    back = (y, y, total, mean, rstd, weight, SEED, dropout_p, rms, torch.float32, torch.float32, torch.float32)
    opcheck(OPS._residual_norm_backward.default, back)


def test_opcheck_linear():
    opcheck(OPS._linear_few_rows.default, (torch.randn(2, 1, 30), torch.randn(9, 30), torch.randn(9)))
    opcheck(OPS._linear_few_rows.default, (torch.randn(30), torch.randn(30, 9).t(), None))


def test_flops_are_counted_as_those_of_torch():
    q, k, v = (torch.randn(2, H, S, D, requires_grad=True) for H, S, D in ((4, 6, 8), (2, 10, 8), (2, 10, 12)))
    multiply_adds = 2 * 4 * 6 * 10
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        F.attention(q, k, v)
        F.attention(q, k, v, causal=True, scale=0.1)
    assert forward.get_total_flops() == 2 * 2 * multiply_adds * (8 + 12)
    with FlopCounterMode(display=False) as both:
        F.attention(q, k, v).sum().backward()
    assert both.get_total_flops() == 2 * multiply_adds * (2 * 8 + 2 * 12 + 2 * 8 + 12)
    packed = [torch.randn(7, 4, 8, requires_grad=True) for _ in range(3)]
    lengths = torch.tensor([0, 3, 7], dtype=torch.int32)
    with FlopCounterMode(display=False) as of_packed:
        F.attention_varlen(*packed, lengths, lengths).sum().backward()
    assert of_packed.get_total_flops() == 2 * 4 * (3 * 3 + 4 * 4) * 7 * 8


def block(q, k, v, residual, weight, bias):
    a = F.attention(q, k, v, causal=True, dropout_p=0.2, dropout_seed=3)
    return F.residual_layer_norm(a, residual, weight, bias, dropout_p=0.1, dropout_seed=4)


def block_inputs(S=9):
    tensors = [*qkv(S=S), torch.randn(2, 2, S, 8), torch.randn(8), torch.randn(8)]
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(backend):
    inputs = block_inputs()
    expected = torch.autograd.grad(block(*inputs).sum(), inputs)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    out = compiled(*inputs)
    torch.testing.assert_close(out, block(*inputs))
    for a, e in zip(torch.autograd.grad(out.sum(), inputs), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compile_traces_either_device(device, monkeypatch):
    """With fake tensors and a backend that compiles nothing, so that no GPU is needed to trace the calls for one."""
    monkeypatch.setattr(tx.arguments, "_ON_CUDA", frozenset(("attention", "residual_norm")))
    shapes = [(2, 2, 9, 8)] * 4 + [(8,)] * 2
    with FakeTensorMode():
        inputs = [torch.empty(shape, device=device) for shape in shapes]
        out = torch.compile(block, fullgraph=True, backend="eager")(*inputs)
    assert out.device.type == device and out.shape == shapes[0]


def test_compile_dynamic_shapes():
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for S in (9, 17, 33):
        inputs = block_inputs(S)
        torch.testing.assert_close(compiled(*inputs), block(*inputs))


def test_compile_draws_new_dropout_each_call():
    compiled = torch.compile(lambda q: F.attention(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    q = torch.randn(1, 1, 20, 8)
    assert not torch.equal(compiled(q), compiled(q))


def test_export():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = tx.ResidualLayerNorm(8)

        def forward(self, q, k, v):
            return self.norm(F.attention(q, k, v, causal=True), q)

    module, inputs = Block(), tuple(qkv())
    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({2: length},) * 3
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    other = tuple(qkv(S=21))
    torch.testing.assert_close(program.module()(*other), module(*other))


def test_meta_tensors():
    q, k, v = (t.to("meta") for t in qkv())
    out, lse = F.attention(q, k, v, return_lse=True)
    assert out.shape == q.shape and out.stride() == q.stride() and lse.shape == (2, 2, 9)
    y = F.residual_layer_norm(torch.empty(3, 5, device="meta"))
    assert y.shape == (3, 5) and y.device.type == "meta"


VMAPPED = {
    "plain": ({}, None),
    "mapped mask": ({}, "mask"),
    "shared mask": ({"mask": torch.rand(9, 9) > 0.2}, None),
    "mapped bias": ({}, "bias"),
    "shared bias": ({"bias": torch.randn(2, 9, 9)}, None),
    "sinks": ({"sinks": torch.randn(2)}, None),
    "dropout": ({"dropout_p": 0.3, "dropout_seed": 9}, None),
    "lengths": ({"key_lengths": torch.tensor([9, 3])}, None),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_is_a_loop(name):
    options, mapped = VMAPPED[name]
    q, k, v = (torch.randn(3, 2, 2, 9, 8) for _ in range(3))
    extra = torch.rand(3, 1, 1, 9, 9) > 0.3 if mapped == "mask" else torch.randn(3, 1, 2, 9, 9)

    def run(q, k, v, extra):
        keywords = {mapped: extra, **options} if mapped else options
        return F.attention(q, k, v, causal=True, **keywords)

    out = torch.func.vmap(run)(q, k, v, extra)
    torch.testing.assert_close(out, torch.stack([run(*t) for t in zip(q, k, v, extra, strict=True)]))
    gradient = torch.func.grad(lambda q, k, v, extra: run(q, k, v, extra).square().sum(), argnums=(0, 1, 2))
    together = torch.func.vmap(gradient)(q, k, v, extra)
    single = [gradient(*t) for t in zip(q, k, v, extra, strict=True)]
    for a, parts in zip(together, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(parts))


def test_vmap_in_dims():
    q, k = torch.randn(2, 2, 9, 3, 8), torch.randn(2, 2, 9, 8)
    out = torch.func.vmap(lambda q: F.attention(q, k, k), in_dims=3)(q)
    torch.testing.assert_close(out, torch.stack([F.attention(q[:, :, :, n], k, k) for n in range(3)]))


def test_vmap_of_a_shared_bias_gradient():
    q, k, v = (torch.randn(3, 2, 2, 9, 8) for _ in range(3))
    bias = torch.randn(1, 2, 9, 9)
    gradient = torch.func.grad(lambda bias, q, k, v: F.attention(q, k, v, bias=bias).square().sum())
    together = torch.func.vmap(gradient, in_dims=(None, 0, 0, 0))(bias, q, k, v)
    torch.testing.assert_close(together, torch.stack([gradient(bias, *t) for t in zip(q, k, v, strict=True)]))


def test_vmap_of_norms():
    x, residual, weight = torch.randn(3, 5, 7), torch.randn(3, 5, 7), torch.randn(7)
    gradient = torch.func.grad(lambda x, r, w: F.residual_layer_norm(x, r, w).square().sum(), argnums=(0, 1, 2))
    together = torch.func.vmap(gradient, in_dims=(0, 0, None))(x, residual, weight)
    single = [gradient(a, b, weight) for a, b in zip(x, residual, strict=True)]
    for a, parts in zip(together, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(parts))


CALLS = {
    "plain": lambda q, k, v, r, w, b: F.residual_layer_norm(F.attention(q, k, v), None, w, b),
    "causal, residual": lambda q, k, v, r, w, b: F.residual_layer_norm(F.attention(q, k, v, causal=True), r, w, b),
    "dropout": block,
    "bias, lse": lambda q, k, v, r, w, b: sum(
        F.attention(q, k, v, bias=b.new_zeros(9, 9) + r.sum(), return_lse=True)[1:]
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_eager_calls_as_transformed_ones(name):
    """Eager calls are recorded by Functions of their own: gradients, batched or with hooks, are those of torch.func."""
    run, inputs = CALLS[name], block_inputs()
    wanted = [n for n, t in enumerate(inputs) if name != "bias, lse" or n in (0, 1, 3)]
    leaves = [inputs[n] for n in wanted]
    expected = torch.func.grad(lambda *t: run(*t).square().sum(), argnums=tuple(wanted))(*inputs)

    def check(out, **options):
        actual = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, **options)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(torch.zeros_like(e) if a is None else a, e)

    check(run(*inputs))
    check(run(*inputs), create_graph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        check(run(*inputs))
    out = run(*inputs)
    cotangents = torch.randn(3, *out.shape)
    one_by_one = [torch.autograd.grad(out, leaves[0], c, retain_graph=True)[0] for c in cotangents]
    (together,) = torch.autograd.grad(out, leaves[0], cotangents, is_grads_batched=True)
    torch.testing.assert_close(together, torch.stack(one_by_one))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_sees_the_same_dropout(reentrant):
    inputs = block_inputs()

    def run(*t):
        a = F.attention(*t[:3], dropout_p=0.4)
        return F.residual_layer_norm(a, *t[3:], dropout_p=0.4)

    torch.manual_seed(3)
    plain = run(*inputs)
    expected = torch.autograd.grad(plain.sum(), inputs)
    torch.manual_seed(3)
    again = checkpoint(run, *inputs, use_reentrant=reentrant)
    torch.testing.assert_close(again, plain)
    again.sum().backward()
    for t, e in zip(inputs, expected, strict=True):
        torch.testing.assert_close(t.grad, e)


def test_autocast():
    q, k, v = qkv(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = F.attention(q, k, v)
        y = F.residual_layer_norm(q, None, torch.ones(8))
        stock = torch.nn.functional.layer_norm(q, (8,), torch.ones(8))
    assert out.dtype == torch.bfloat16 and y.dtype == stock.dtype
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert F.attention(*(t.double() for t in (q, k, v))).dtype == torch.float64


def test_no_graph_without_need():
    q, k, v = qkv(requires_grad=True)
    with torch.no_grad():
        assert F.attention(q, k, v).grad_fn is None
    assert F.attention(*(t.detach() for t in (q, k, v))).grad_fn is None
    with torch.inference_mode():
        assert F.attention(q, k, v).is_inference()


def test_unused_outputs_and_partial_gradients():
    q, k, v = qkv(requires_grad=True)
    _, lse = F.attention(q, k, v, return_lse=True)
    grads = torch.autograd.grad(lse.sum(), (q, k, v))
    assert grads[2].eq(0).all() and grads[0].ne(0).any()
    (only,) = torch.autograd.grad(F.attention(q.detach(), k.detach(), v).sum(), (v,))
    torch.testing.assert_close(only.sum(), torch.tensor(float(q.numel())))


def test_modules_are_copied():
    module = tx.ResidualLayerNorm(8, dropout=0.1)
    twin = copy.deepcopy(module)
    x = torch.randn(3, 8)
    torch.testing.assert_close(twin.eval()(x), module.eval()(x))


def test_products_of_torch_beside_ours():
    """Where the CPU has tile registers, both lay them out for themselves in the same threads."""
    linear, x = torch.nn.Linear(512, 512).bfloat16(), torch.randn(4, 128, 512).bfloat16()
    q = torch.randn(2, 8, 256, 64).bfloat16()
    calls = (lambda: linear(x), lambda: F.attention(q, q, q), lambda: linear(x[:3, :7]))
    with torch.no_grad():
        expected = [call() for call in calls]
        for _ in range(20):
            assert all(torch.equal(call(), e) for call, e in zip(calls, expected, strict=True))
