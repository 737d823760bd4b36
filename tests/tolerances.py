"""The only place of tolerances. None is guessed: a result may be twice as far from float64 as the same maths is.

The yardstick is the reference in the dtype under test. On some inputs it happens to round very little, so the rounding
of the result itself is added.
For float64, which has nothing better to be compared with, the yardstick is that of float32, scaled by the two epsilons;
what rounds is then not the same, which is allowed for by another factor of 2.
"""

import platform

import torch

from tformer_ext import _C

FACTOR = 2.0
# torch's own products, which the yardstick is made of, use fused multiply-add; kernels without it round twice as often.
FACTOR_WITHOUT_FMA = 3.0
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def factor():
    without = _C.cpu_isa() == "baseline" and platform.machine() == "x86_64"
    return FACTOR_WITHOUT_FMA if without else FACTOR


def yardstick_dtype(dtype):
    """The dtype in which the same maths is run to see how far it gets."""
    return torch.float32 if dtype == torch.float64 else dtype


def farther(forms, golden):
    """Of several ways to do the same maths in a dtype the one farther from float64: a single one may be lucky."""
    there = torch.isfinite(golden)
    return max(forms, key=lambda t: (t[there].double() - golden[there]).norm().nan_to_num(0).item())


def _scale(actual, yardstick):
    if actual.dtype != torch.float64:
        return 1.0
    return 2.0 * torch.finfo(actual.dtype).eps / torch.finfo(yardstick.dtype).eps


def rounding_floor(expected, dtype):
    """Twice what rounding the largest expected value to dtype may lose: nothing can be asked to be closer."""
    return torch.finfo(dtype).eps * expected.abs().max().item() if expected.numel() else 0.0


def finite_where_expected(actual, expected, name):
    """NaN and infinities stand exactly where the reference has them."""
    assert torch.equal(torch.isnan(actual), torch.isnan(expected)), f"{name}: NaN in other places than expected"
    infinite = torch.isinf(expected)
    assert torch.equal(torch.isinf(actual), infinite), f"{name}: infinities in other places than expected"
    assert torch.equal(actual[infinite].double(), expected[infinite].double()), f"{name}: infinities of other sign"


def assert_close(actual, golden, yardstick, name="result"):
    """actual (dtype under test) against golden (float64), by the error of yardstick (same maths in that dtype)."""
    assert actual.shape == golden.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(golden.shape)}"
    finite_where_expected(actual, golden, name)
    there = torch.isfinite(golden)
    got, want, same = actual[there].double(), golden[there], yardstick[there].double()
    if want.numel() == 0:
        return
    error, allowed = (got - want).abs().max().item(), (same - want).abs().max().item()
    allowed *= _scale(actual, yardstick)
    bound = factor() * allowed + rounding_floor(want, actual.dtype)
    assert error <= bound, f"{name}: error {error:.3g}, the same maths has {allowed:.3g}, {bound=:.3g}"


def assert_gradient_close(actual, golden, yardstick, name="gradient"):
    """assert_close, and as vectors: a bias in one direction cannot hide below an elementwise bound."""
    assert_close(actual, golden, yardstick, name)
    there = torch.isfinite(golden)
    got, want, same = actual[there].double(), golden[there], yardstick[there].double()
    size = want.norm().item()
    if size == 0:
        return
    relative, allowed = (got - want).norm().item() / size, (same - want).norm().item() / size
    allowed *= _scale(actual, yardstick)
    floor = torch.finfo(actual.dtype).eps
    assert relative <= factor() * allowed + floor, f"{name}: relative L2 error {relative:.3g}, same maths {allowed:.3g}"
    cosine = torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0).item()
    assert cosine >= 1 - (factor() * allowed + floor) - 1e-12, f"{name}: cosine {cosine}"
