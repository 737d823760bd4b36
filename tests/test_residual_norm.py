"""residual_layer_norm, residual_rms_norm: values and gradients, accuracy, determinism."""

from unittest import mock

import pytest
import torch
from tolerances import DTYPES, assert_close, assert_gradient_close, farther, yardstick_dtype

from tformer_ext import functional as F
from tformer_ext import reference
from tformer_ext.reference import norm_dropout_mask

SHAPES = [(3, 7), (5, 64), (33, 768), (130, 65), (70, 1000), (5, 2100)]  # backward: 1, 2 or 4 rows at once
FUNCTIONS = {
    "layer": (F.residual_layer_norm, reference.residual_layer_norm),
    "rms": (F.residual_rms_norm, reference.residual_rms_norm),
}
VARIANTS = {
    "alone": {"residual": False},
    "no weight": {"residual": True, "weight": False},
    "no bias": {"residual": True, "bias": False},
    "residual": {"residual": True},
    "residual returned": {"residual": True, "return_residual": True},
    "dropout": {"residual": True, "dropout_p": 0.3, "dropout_seed": 5},
    "dropout alone": {"residual": False, "dropout_p": 0.3, "dropout_seed": -5},
    "dropout returned": {"residual": True, "dropout_p": 0.1, "dropout_seed": 2**40 + 1, "return_residual": True},
    "everything dropped": {"residual": True, "dropout_p": 1.0, "dropout_seed": 1},
    "residual in float32": {"residual": True, "return_residual": True, "residual_dtype": torch.float32},
}


def inputs(shape, dtype, variant):
    options = dict(VARIANTS[variant])
    x = torch.randn(shape, dtype=dtype)
    residual = torch.randn(shape, dtype=dtype) if options.pop("residual") else None
    weight = torch.randn(shape[-1], dtype=dtype) if options.pop("weight", True) else None
    bias = torch.randn(shape[-1], dtype=dtype) if options.pop("bias", True) and weight is not None else None
    return [x, residual, weight, bias], options


def run(function, tensors, options, cotangents):
    """(y, h or None) and the gradients of the tensors that are there."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    result = function(*leaves, **options)
    y, h = result if isinstance(result, tuple) else (result, None)
    loss = (y * cotangents[0].to(y.dtype)).sum()
    if h is not None:
        loss = loss + (h * cotangents[1].to(h.dtype)).sum()
    grads = torch.autograd.grad(loss, [t for t in leaves if t is not None])
    return [y.detach()] + ([] if h is None else [h.detach()]), grads


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(kind, variant, kernels):
    function, specification = FUNCTIONS[kind]
    for dtype in DTYPES:
        if dtype == torch.float64 and VARIANTS[variant].get("residual_dtype"):
            continue
        for shape in SHAPES:
            torch.manual_seed(2)
            tensors, options = inputs(shape, dtype, variant)
            cotangents = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            low = yardstick_dtype(dtype)
            wide = {**options, "residual_dtype": None}
            golden = run(specification, _cast(tensors, torch.float64), wide, cotangents)
            same = yardsticks(specification, _cast(tensors, low), options, cotangents)
            actual = run(function, tensors, options, cotangents)
            for a, g, s in zip(actual[0], golden[0], same[0], strict=True):
                assert_close(a, g, farther(s, g), f"{dtype} {shape}")
            for n, (a, g, s) in enumerate(zip(actual[1], golden[1], same[1], strict=True)):
                assert_gradient_close(a, g, farther(s, g), f"{dtype} {shape} gradient {n}")


def yardsticks(specification, tensors, options, cotangents):
    """The same maths with its sums in several orders: rows and columns permuted, and what dropout keeps with them."""
    results = []
    for seed in range(4):
        draw = torch.Generator("cpu").manual_seed(seed)
        M, N = cotangents[0].shape
        rows, columns = (torch.randperm(n, generator=draw, device="cpu") for n in (M, N))

        def permuted(t, rows=rows, columns=columns):
            return t if t is None else t[columns] if t.dim() == 1 else t[rows][:, columns]

        def mask(*args, permuted=permuted, **kwargs):
            return permuted(norm_dropout_mask(*args, **kwargs))

        with mock.patch.object(reference.residual_norm, "norm_dropout_mask", mask):
            outs, grads = run(specification, map(permuted, tensors), options, [permuted(c) for c in cotangents])
        back_r, back_c = rows.argsort(), columns.argsort()
        results.append([[permuted(t, back_r, back_c) for t in group] for group in (outs, grads)])
    return [list(zip(*(r[n] for r in results), strict=True)) for n in (0, 1)]


def _cast(tensors, dtype):
    return [None if t is None else t.to(dtype) for t in tensors]


def test_one_column(kernels):
    """LayerNorm of one number is its bias, RMSNorm its sign: the gradients cancel to nothing."""
    x = torch.randn(50, 1, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert torch.equal(F.residual_layer_norm(x, None, weight, bias), torch.ones_like(x))
    y = F.residual_rms_norm(x, None, weight, eps=0.0)
    torch.testing.assert_close(y, x.sign())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.abs().max() < 1e-12


def test_more_dimensions_and_strides(kernels):
    x = torch.randn(3, 4, 5, 6).transpose(0, 1)
    residual = torch.randn(4, 3, 5, 6)
    weight, bias = torch.randn(5, 6), torch.randn(5, 6)
    y, h = F.residual_layer_norm(x, residual, weight, bias, return_residual=True)
    torch.testing.assert_close(h, x + residual)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x + residual, (5, 6), weight, bias))
    wide = torch.randn(10, 20)[:, 3:13]
    torch.testing.assert_close(F.residual_layer_norm(wide), torch.nn.functional.layer_norm(wide, (10,)))
    steps = torch.randn(10, 20)[:, ::2]
    torch.testing.assert_close(F.residual_layer_norm(steps), torch.nn.functional.layer_norm(steps, (10,)))
    torch.testing.assert_close(F.residual_layer_norm(x[0, 0, 0]), torch.nn.functional.layer_norm(x[0, 0, 0], (6,)))


def test_weights_of_another_dtype(kernels):
    x = torch.randn(8, 32, dtype=torch.bfloat16)
    weight, bias = torch.randn(32, requires_grad=True), torch.randn(32, requires_grad=True)
    y = F.residual_layer_norm(x, x, weight, bias)
    grads = torch.autograd.grad(y.float().sum(), (weight, bias))
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    expected = reference.residual_layer_norm(x.double(), x.double(), weight.double(), bias.double())
    assert (y.double() - expected).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4)], ids=str)
def test_empty(shape, kernels):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True)
    y, h = F.residual_layer_norm(x, x, weight, return_residual=True)
    assert y.shape == shape and h.shape == shape
    grads = torch.autograd.grad(y.sum() + h.sum(), (x, weight))
    assert grads[0].shape == shape and torch.equal(grads[1], torch.zeros(shape[-1]))


def test_variance_does_not_cancel(kernels):
    """E[x^2] - mean^2 in float32 has an error of 1e3 here."""
    x = torch.randn(64, 512) + 1e4
    weight = torch.randn(512)
    golden = reference.residual_layer_norm(x.double(), None, weight.double())
    ours = (F.residual_layer_norm(x, None, weight).double() - golden).abs().max()
    torchs = (torch.nn.functional.layer_norm(x, (512,), weight).double() - golden).abs().max()
    assert ours <= 2 * torchs + 1e-6 and ours < 5e-3


def test_parameter_gradients_accumulate_in_float32(kernels):
    """torch's CPU kernel sums them in bfloat16 and is off by a tenth at this size."""
    x, dy = torch.randn(8192, 64).bfloat16(), torch.randn(8192, 64).bfloat16()
    weight, bias = (torch.randn(64).bfloat16().requires_grad_() for _ in range(2))
    actual = torch.autograd.grad(F.residual_layer_norm(x, None, weight, bias), (weight, bias), dy)
    doubles = [t.detach().double().requires_grad_() for t in (weight, bias)]
    golden = torch.autograd.grad(reference.residual_layer_norm(x.double(), None, *doubles), doubles, dy.double())
    for a, g in zip(actual, golden, strict=True):
        assert ((a.double() - g).norm() / g.norm()) < 2 * torch.finfo(torch.bfloat16).eps


def test_non_finite_rows_stay_rows(kernels):
    x = torch.randn(6, 40)
    x[2, 7], x[4, 39] = float("nan"), float("inf")
    y = F.residual_layer_norm(x)
    assert torch.isnan(y[[2, 4]]).all() and torch.isfinite(y[[0, 1, 3, 5]]).all()


@pytest.mark.parametrize("width", [64, 100, 160])  # blocks of 64 columns alone, and with a rest
def test_subnormal_bfloat16(isa, width):
    """The CPU's own conversion to bfloat16 makes 0 of them."""

    def small():
        numbers = (torch.randn(6, width) * 2.0 ** torch.randint(-134, -120, (6, width))).bfloat16()
        return numbers * (torch.rand(6, width) < 0.9)  # zeros, too

    x, residual, weight = small(), small(), small()[0].float()
    _, h = F.residual_layer_norm(x, residual, return_residual=True)
    assert ((h != 0) & (h.float().abs() < torch.finfo(torch.float32).tiny)).sum() > width
    assert torch.equal(h, (x.float() + residual.float()).bfloat16())
    signs = torch.randn(6, width).sign().bfloat16()
    y = F.residual_rms_norm(signs, None, weight, eps=0.0)
    assert torch.equal(y, (signs.float() * weight).bfloat16())


@pytest.mark.parametrize("width", [64, 100, 160])  # blocks of 64 columns alone, and with a rest
def test_bfloat16_is_rounded_as_torch_does(isa, width):
    """Ties to even, the largest to infinity, and what is no number beside them."""
    x = torch.randn(40, width).bfloat16().float() * 2.0 ** torch.randint(-100, 100, (40, width))
    ulp = (x.view(torch.int32) & 0x7F800000).view(torch.float32) / 2**7
    rest = ulp * torch.tensor([0.5, 0.5, 0.25, 0.75, -0.5])[torch.randint(5, (40, width))]
    x[1::4, 7], rest[1::4, 7] = torch.finfo(torch.bfloat16).max, 2.0**119  # the tie between it and the next power of 2
    x[2::4, 33], x[3::4, 60], x[3::4, 63] = torch.nan, -torch.inf, torch.inf
    expected = (x + rest).bfloat16()
    _, h = F.residual_layer_norm(x.bfloat16(), rest.bfloat16(), return_residual=True)
    assert torch.equal(h.isnan(), expected.isnan()) and torch.equal(h[~h.isnan()], expected[~h.isnan()])
    assert h[1::4, 7].isinf().all() and h[2::4, 33].isnan().all() and h.isnan().sum() == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1024, 1000])  # whole cache lines in each row, and not
def test_results_larger_than_the_caches(isa, dtype, width):
    """Written past the caches where rows are whole lines: the same bits as in small pieces."""
    rows = 40 * 2**20 // (width * dtype.itemsize)
    x, residual, grad = (torch.randn(rows, width, dtype=dtype) for _ in range(3))
    x.requires_grad_()
    whole, total = F.residual_layer_norm(x, residual, dropout_p=0.1, dropout_seed=3, return_residual=True)
    (from_whole,) = torch.autograd.grad(whole, x, grad)
    same, kept = F.residual_layer_norm(x[:500], residual[:500], dropout_p=0.1, dropout_seed=3, return_residual=True)
    (from_part,) = torch.autograd.grad(same, x, grad[:500])
    assert torch.equal(whole[:500], same) and torch.equal(total[:500], kept)
    assert torch.equal(from_whole[:500], from_part[:500])
    assert torch.equal(whole[500:], F.residual_layer_norm(total)[500:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["residual returned", "dropout"])
def test_rows_from_memory(isa, dtype, variant):
    """Backward takes rows one by one from 32 MB on, which a test of small calls does not reach."""
    width = 777
    shape = 33 * 2**20 // (3 * dtype.itemsize * width), width
    tensors, options = inputs(shape, dtype, variant)
    cotangents = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    golden = run(reference.residual_layer_norm, _cast(tensors, torch.float64), options, cotangents)
    same = run(reference.residual_layer_norm, tensors, options, cotangents)
    actual = run(F.residual_layer_norm, tensors, options, cotangents)
    for n, (a, g, s) in enumerate(
        zip(actual[0] + [*actual[1]], golden[0] + [*golden[1]], same[0] + [*same[1]], strict=True)
    ):
        assert_close(a, g, s, f"result {n}")
