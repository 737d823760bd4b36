"""`python -m tformer_ext selfcheck`: do the kernels of this machine compute what the reference says?

Every instruction set that the CPU has and, if there are kernels for it, the GPU; every dtype, each operation forward
and backward, against the reference in float64. An error may be as large as a few roundings in that dtype; what is
printed is its share of that.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tformer_ext import _C, functional, reference
from tformer_ext.arguments import has_cuda_kernels

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A broken kernel is wrong by far more than this many times the dtype's epsilon (of the largest element), a sound one by
# less: sums of float64 and float32 round at every step, results of the 16-bit dtypes only once. The test suite compares
# with tolerances measured case by case instead.
ROUNDINGS = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class Check:
    """Names of the inputs with their shapes; options of the call, which take a gradient if they are tensors."""

    name: str
    operation: str
    inputs: dict[str, tuple[int, ...]]
    options: dict[str, object]


QKV = {"query": (2, 4, 37, 40), "key": (2, 2, 75, 40), "value": (2, 2, 75, 24)}
ROWS = {"x": (37, 203), "residual": (37, 203), "weight": (203,), "bias": (203,)}
CHECKS = (
    Check("attention", "attention", QKV, {}),
    Check("attention causal", "attention", QKV, {"causal": "lower_right"}),
    Check("attention bias", "attention", {**QKV, "bias": (1, 4, 37, 75)}, {"window": (30, 8), "softcap": 5.0}),
    Check("attention dropout", "attention", {**QKV, "sinks": (4,)}, {"dropout_p": 0.2, "dropout_seed": 7}),
    Check("residual_layer_norm", "residual_layer_norm", ROWS, {}),
    Check("residual_layer_norm dropout", "residual_layer_norm", ROWS, {"dropout_p": 0.2, "dropout_seed": 7}),
    Check("residual_rms_norm", "residual_rms_norm", ROWS, {}),
)
# on the CPU alone
OF_CPU = (
    Check(
        "cross_entropy",
        "cross_entropy",
        {"input": (203, 601)},
        {"target": 2 * torch.arange(203) - 2, "ignore_index": -2, "label_smoothing": 0.1},
    ),
)


@dataclass(frozen=True)
class Outcome:
    """error: the largest, as a share of what is allowed; infinite if something is not finite."""

    isa: str
    dtype: str
    name: str
    error: float

    @property
    def passed(self) -> bool:
        return self.error <= 1.0


def main(argv: list[str] | None = None) -> int:
    """Prints a line per check; 0 if all pass, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m tformer_ext selfcheck", description=__doc__)
    parser.parse_args(argv)
    failed = count = 0
    for outcome in outcomes():
        count += 1
        failed += not outcome.passed
        verdict = "PASS" if outcome.passed else "FAIL"
        print(
            f"{verdict}  {outcome.isa:<11} {outcome.dtype:<9} {outcome.name:<28} {outcome.error:4.0%} of the tolerance"
        )
    print(f"{count - failed} of {count} checks passed")
    return 1 if failed else 0


def outcomes() -> Iterator[Outcome]:
    """Runs everything; the instruction set in use is put back at the end."""
    before = _C.cpu_isa()
    try:
        for isa, dtype, check in itertools.product(_C.supported_isas(), DTYPES, CHECKS + OF_CPU):
            _C.set_cpu_isa(isa)
            yield Outcome(isa, str(dtype).removeprefix("torch."), check.name, largest_error(check, dtype))
    finally:
        _C.set_cpu_isa(before)
    if torch.cuda.is_available():
        gpu = "sm_{}{}".format(*torch.cuda.get_device_capability())
        for dtype, check in itertools.product(DTYPES, CHECKS):
            if has_cuda_kernels("attention" if check.operation == "attention" else "residual_norm"):
                yield Outcome(gpu, str(dtype).removeprefix("torch."), check.name, largest_error(check, dtype, "cuda"))


def largest_error(check: Check, dtype: torch.dtype, device: str = "cpu") -> float:
    """Of the output and all gradients, each as a share of what it may be."""
    draw = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in check.inputs.items()}
    there = {name: t.to(device) for name, t in inputs.items()}
    fused = getattr(functional, check.operation)
    if check.operation == "cross_entropy":
        fused = functools.partial(fused, reduction="none")
    actual = [t.cpu() for t in output_and_gradients(fused, there, check.options)]
    wide = {name: t.double() for name, t in inputs.items()}
    expected = output_and_gradients(getattr(reference, check.operation), wide, check.options)
    worst = 0.0
    for got, want in zip(actual, expected, strict=True):
        allowed = ROUNDINGS[dtype] * torch.finfo(dtype).eps * want.abs().max().item()
        error = (got.double() - want).abs().max().item() / allowed
        worst = max(worst, error if torch.isfinite(got).all() else float("inf"))
    return worst


def output_and_gradients(
    operation: Callable, inputs: dict[str, torch.Tensor], options: dict[str, object]
) -> list[torch.Tensor]:
    """[output, gradient of each input] for the same gradient of the output each time."""
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    out = operation(**leaves, **options)
    draw = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=draw).bfloat16().to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), cotangent)]
