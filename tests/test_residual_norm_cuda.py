"""What the CUDA norms do differently for widths, strides and devices, and what no order of their threads may change."""

import pytest
import torch
from test_residual_norm import FUNCTIONS, inputs, run, yardsticks
from tolerances import assert_close, assert_gradient_close, farther, yardstick_dtype

from tformer_ext import functional as F
from tformer_ext import reference
from tformer_ext.reference.philox import keep_scale

LAYER = FUNCTIONS["layer"]
# (dtype, width): rows that a group of threads or a warp just holds, and a piece more, whole and not; rows over several
# warps, over the whole block, kept forward only, and too wide to be kept.
WIDE = [
    (torch.bfloat16, 256), (torch.bfloat16, 264), (torch.bfloat16, 1032), (torch.bfloat16, 1025), (torch.float16, 1021),
    (torch.float32, 260), (torch.float32, 1028), (torch.float32, 1027), (torch.float64, 130), (torch.float64, 129),
    (torch.bfloat16, 1536), (torch.bfloat16, 8192), (torch.bfloat16, 8200), (torch.bfloat16, 16500),
    (torch.float32, 4097), (torch.float32, 9000), (torch.float32, 17000), (torch.float64, 2500), (torch.float64, 8300),
]  # fmt: skip


def compare(tensors, options, rows, width, dtype, kind="layer"):
    """Values and gradients against float64."""
    function, specification = FUNCTIONS[kind]
    cotangents = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    double = [None if t is None else t.double() for t in tensors]
    low = [None if t is None else t.to(yardstick_dtype(dtype)) for t in tensors]
    golden = run(specification, double, {**options, "residual_dtype": None}, cotangents)
    same = yardsticks(specification, low, options, cotangents)
    actual = run(function, tensors, options, cotangents)
    for a, g, s in zip(actual[0], golden[0], same[0], strict=True):
        assert_close(a, g, farther(s, g))
    for n, (a, g, s) in enumerate(zip(actual[1], golden[1], same[1], strict=True)):
        assert_gradient_close(a, g, farther(s, g), f"gradient {n}")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def kernels(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("dtype, width", WIDE)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_widths(kernels, dtype, width, kind):
    tensors, options = inputs((7, width), dtype, "dropout returned")
    compare(tensors, options, 7, width, dtype, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_for_each_block(kernels, dtype):
    for shape in ((400, 100), (100, 1100)):
        tensors, options = inputs(shape, dtype, "residual returned")
        compare(tensors, options, *shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset, stride, width", [(0, 208, 201), (8, 208, 200), (1, 201, 200), (3, 207, 64)])
def test_strides_and_alignment(kernels, dtype, offset, stride, width):
    """Rows that begin at multiples of 16 bytes and end anywhere; rows that begin anywhere."""
    rows, parameters = 21, torch.randn(2, width + offset, dtype=dtype)
    x, residual = (
        torch.randn(offset + rows * stride, dtype=dtype)[offset:].view(rows, stride)[:, :width] for _ in range(2)
    )
    weight, bias = parameters[:, offset:]
    y, h = F.residual_layer_norm(x, residual, weight, bias, return_residual=True)
    golden, sums = reference.residual_layer_norm(
        x.double(), residual.double(), weight.double(), bias.double(), return_residual=True
    )
    same, low = reference.residual_layer_norm(x, residual, weight, bias, return_residual=True)
    assert_close(y, golden, same)
    assert_close(h, sums, low)
    grad = torch.randn(offset + rows * stride, dtype=dtype)[offset:].view(rows, stride)[:, :width]
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    strided = torch.autograd.grad(F.residual_layer_norm(*leaves[:1], None, *leaves[1:]), leaves, grad)
    dense = [t.detach().contiguous().clone().requires_grad_() for t in leaves]
    compact = torch.autograd.grad(F.residual_layer_norm(dense[0], None, *dense[1:]), dense, grad.contiguous().clone())
    for a, b in zip(strided, compact, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_parameters(kernels, weight_dtype):
    x = torch.randn(9, 77, dtype=torch.bfloat16)
    weight, bias = (torch.randn(77, dtype=weight_dtype, requires_grad=True) for _ in range(2))
    y = F.residual_layer_norm(x, None, weight, bias)
    grads = torch.autograd.grad(y.float().sum(), (weight, bias))
    wide = [t.detach().double().requires_grad_() for t in (weight, bias)]
    golden = reference.residual_layer_norm(x.double(), None, *wide)
    expected = torch.autograd.grad(golden.sum(), wide)
    torch.testing.assert_close(y.double(), golden, rtol=2**-7, atol=2**-7)
    for a, e in zip(grads, expected, strict=True):
        assert a.dtype == weight_dtype
        torch.testing.assert_close(a.double(), e, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [200, 201, 8200, 8205])  # whole pieces and not
@pytest.mark.parametrize("p, seed", [(0.1, 7), (0.5, -1), (0.93, 2**62 - 1)])
def test_dropout_mask_is_the_references(kernels, dtype, width, p, seed):
    x = torch.ones(3, width, dtype=dtype, requires_grad=True)
    _, h = F.residual_layer_norm(x, dropout_p=p, dropout_seed=seed, return_residual=True)
    (gradient,) = torch.autograd.grad(h, x, torch.ones_like(h))
    kept = reference.norm_dropout_mask(seed, 3, width, p).to(h.device)
    for t in (h.detach(), gradient):
        assert torch.equal(t != 0, kept)
        torch.testing.assert_close(t[kept], torch.full_like(t[kept], keep_scale(p)))


def shifted(t):
    """The same numbers, not at a multiple of 16 bytes."""
    return None if t is None else t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t).detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["dropout returned", "residual in float32", "no weight", "alone"])
def test_bits_do_not_depend_on_alignment(kernels, dtype, variant):
    """Of rows of whole pieces, which are read a piece at a time where they are aligned."""
    if dtype == torch.float64 and variant == "residual in float32":
        pytest.skip("residual_dtype is for lower dtypes")
    for shape in ((70, 8), (33, 64), (40, 256), (20, 264), (9, 1032), (3, 4104), (2, 8200), (2, 16400)):
        tensors, options = inputs(shape, dtype, variant)
        cotangents = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        expected = run(LAYER[0], tensors, options, cotangents)
        leaves = [t if t is None else shifted(t).requires_grad_() for t in tensors]
        outs = LAYER[0](*leaves, **options)
        outs = outs if isinstance(outs, tuple) else (outs,)
        wanted = [t for t in leaves if t is not None]
        given = [shifted(c.to(o.dtype)) for c, o in zip(cotangents[: len(outs)], outs, strict=True)]
        grads = torch.autograd.grad(outs, wanted, given)
        for n, (a, b) in enumerate(zip((*outs, *grads), (*expected[0], *expected[1]), strict=True)):
            assert torch.equal(a, b), f"{shape} result {n}"


def results(dtype, shape, variant="dropout returned"):
    torch.manual_seed(3)
    tensors, options = inputs(shape, dtype, variant)
    outs, grads = run(LAYER[0], tensors, options, (torch.randn(shape), torch.randn(shape)))
    return [*outs, *grads]


SHAPES = [(100, 72), (50, 1000), (50, 1001), (20, 4100), (5, 17000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(emulated, shape):
    for dtype in (torch.float32, torch.bfloat16):
        expected = results(dtype, shape)
        for seed in range(1, 4):
            emulated.set_seed(seed)
            for n, (a, b) in enumerate(zip(results(dtype, shape), expected, strict=True)):
                assert torch.equal(a, b), f"result {n} of {dtype} has a race"


@pytest.mark.parametrize("dtype, kib", [(torch.float32, 99), (torch.bfloat16, 60)])
@pytest.mark.parametrize("variant", ["dropout returned", "residual in float32", "residual"])
def test_bits_do_not_depend_on_shared_memory(emulated, dtype, kib, variant):
    """A device with less of it fetches no row ahead."""
    kib += 40 * (dtype == torch.bfloat16 and variant == "residual in float32")
    for shape in SHAPES:
        emulated.set_shared_bytes(163 << 10)
        expected = results(dtype, shape, variant)
        emulated.set_shared_bytes(kib << 10)
        for a, b in zip(results(dtype, shape, variant), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7), (5, 64), (2, 1001), (2, 1032), (2, 8200)], ids=str)
def test_nothing_past_the_inputs_is_read(emulated, dtype, shape):
    tensors, options = inputs(shape, dtype, "dropout returned")
    guarded = [emulated.guarded(t) for t in tensors]
    cotangents = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    expected = run(LAYER[0], tensors, options, cotangents)
    leaves = [t.requires_grad_() for t in guarded]
    y, h = LAYER[0](*leaves, **options)
    grads = torch.autograd.grad((y, h), leaves, [emulated.guarded(t) for t in cotangents])
    for a, b in zip((y, h, *grads), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)


def test_sum_is_that_of_the_cpu(emulated, monkeypatch):
    """h is rounded once on every backend."""
    x, residual = torch.randn(12, 300).bfloat16(), torch.randn(12, 300).bfloat16()
    options = {"dropout_p": 0.3, "dropout_seed": 5, "return_residual": True}
    ours = F.residual_rms_norm(x, residual, **options)[1]
    monkeypatch.undo()
    assert torch.equal(ours, F.residual_rms_norm(x, residual, **options)[1])


def test_operators_guard_memory(emulation):
    operators = torch.ops.tformer_emulated
    x = torch.randn(4, 6)
    for bad in ((x, x[:2]), (x, None, torch.ones(5)), (x, None, torch.ones(6).long()), (x.T, None)):
        with pytest.raises(RuntimeError, match="tformer_ext"):
            operators._residual_norm_forward(*bad)
    with pytest.raises(RuntimeError, match="dropout_seed"):
        operators._residual_norm_forward(x, dropout_p=0.5)
    with pytest.raises(NotImplementedError):
        operators._residual_norm_forward(x.to("meta"))
