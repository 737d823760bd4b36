"""Linear layers of a Transformer layer, past what is slow in torch's own on a CPU.

Linear: torch multiplies float32 with MKL, which stays well below oneDNN's speed on CPUs other than Intel's, and writes
the bias first, then adds the product to it. oneDNN's linear takes bias and activation along. Where a CPU does not
multiply a 16-bit dtype, torch's products of it took 3 to 5 times as long as float32 ones (on a Cascade Lake): there
operands are widened, which is exact, and the float32 sums rounded once, as torch rounds its own. A few rows, which is
what a model that generates multiplies, go to a kernel that reads the weights as fast as memory gives them.
Everything that is no plain tensor on a CPU (subclasses, tracing, transforms, derivatives in forward mode, dispatch
modes) goes to torch, as does autocast to a dtype that the CPU multiplies.
"""

import functools
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import _C
from ..arguments import DTYPES
from ..ops.linear import linear_few_rows
from ..ops.recording import call, is_plain_cpu_tensor, needs_function
from .plain import is_plain

_PLAIN = (torch.Tensor, nn.Parameter)
_FEW_ROWS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_MULTIPLY_ADDS = 1 << 17  # with fewer, all that follows would cost more than it saves
_MOST_FEW_ROWS = 8  # with more, arithmetic begins to show beside reading the weights
_LEAST_WIDENED_ROWS = 16  # fewer do not pay for widening the weight
_MOST_WIDENED = 1 << 22  # elements of an operand that are in float32 at a time
_MOST_TRANSPOSED = 1 << 20  # elements of a gradient whose part of a weight's is transposed at a time
_LEAST_TRANSPOSED = 256  # its columns at least: fewer make a slow product

_ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu_, "gelu": nn.functional.gelu}


def linear(x, weight, bias, activation="none"):
    """activation(torch.nn.functional.linear(x, weight, bias)); activation "none", "relu" or (exact) "gelu"."""
    # not traced: what is asked about sizes, and follows from them, would be fixed in the graph or become its guards
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if (
        traced
        or type(x) not in _PLAIN
        or x.numel() * weight.shape[0] < _LEAST_MULTIPLY_ADDS
        or not is_plain_cpu_tensor(x)
    ):
        return _ACTIVATIONS[activation](nn.functional.linear(x, weight, bias))
    if _is_autocast_to_widened(x, weight, bias):
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return linear(*(None if t is None else t.to(dtype) for t in (x, weight, bias)), activation)
    if _is_few_rows(x, weight, bias):
        return _ACTIVATIONS[activation](linear_few_rows(x.contiguous(), weight, bias))
    if not _is_taken(x, weight, bias):
        return _ACTIVATIONS[activation](nn.functional.linear(x, weight, bias))
    if not needs_function(x, weight, bias):
        return _product(x, weight, bias, activation)
    if x.dtype != torch.float32 and x.dtype not in _widened_dtypes():
        return _ACTIVATIONS[activation](nn.functional.linear(x, weight, bias))
    # as rows: the operator returns a view of anything else, and a Function's views are not to be modified in place
    relu = activation == "relu"
    y = call(_Linear, x.reshape(-1, x.shape[-1]), weight, bias, relu).view(*x.shape[:-1], -1)
    return y if relu else _ACTIVATIONS[activation](y)


class Linear(nn.Linear):
    """torch.nn.Linear: same constructor, parameters, initial weights and forward, in any dtype and on any device.

    On x86-64 CPUs that do not multiply a 16-bit dtype its products of 16 rows or more are made in float32 and rounded
    once, as torch's are; there too under torch.autocast to that dtype. Float32 products are oneDNN's on AMD's CPUs.
    Up to 8 rows, or 15 of such a 16-bit dtype, where no gradient is wanted, are multiplied by a kernel of its own. All
    else is torch's.

    input: (..., in_features); returns (..., out_features) of the same dtype, or autocast's.
    """

    def forward(self, input):
        return linear(input, self.weight, self.bias)


def is_plain_linear(module):
    """Whether module does what torch.nn.Linear does and nothing else."""
    kind = type(module)
    return kind in (nn.Linear, Linear, NonDynamicallyQuantizableLinear) and is_plain(module, kind)


def call_linear(module, x):
    """module(x), which may be any module."""
    return linear(x, module.weight, module.bias) if is_plain_linear(module) else module(x)


def _product(x, weight, bias, activation="none"):
    """activation(x weightT + bias), not recorded; activation as in `linear`."""
    if x.dtype in _widened_dtypes():
        return _ACTIVATIONS[activation](_widened_product(x, weight, bias))
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # oneDNN would multiply by its slowest code, which takes hundreds of times as long
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, [], "none")


def _weight_gradient(grad, x, weight):
    """gradT x: (O, I), in the memory order of weight, from rows of the gradient (M, O) and of x (M, I); not recorded.

    oneDNN wants the rows of its first operand in one piece and copies that operand if they are not. A gradient that is
    wider than x is not copied: xT grad is made instead, in parts whose transposition stays in cache.
    """
    rows, columns = grad.shape
    if weight.t().is_contiguous():
        return _product(x.t(), grad.t(), None).t()
    if x.dtype in _widened_dtypes() or columns <= x.shape[1] or rows <= x.shape[1]:
        return _product(grad.t(), x.t(), None)
    transposed = x.t().contiguous()
    result = torch.empty_like(weight)
    step = max(_LEAST_TRANSPOSED, _MOST_TRANSPOSED // rows)
    for n in range(0, columns, step):
        result[n : n + step] = _product(transposed, grad[:, n : n + step].contiguous().t(), None).t()
    return result


def _widened_product(x, weight, bias):
    """In float32, some rows of each operand at a time."""
    product = _product if torch.float32 in _onednn_dtypes() else nn.functional.linear
    step = max(1, _MOST_WIDENED // weight.shape[1])
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(len(rows), len(weight))
    with torch.autocast("cpu", enabled=False):  # in which backward may be called
        for m in range(0, len(rows), step):
            some = rows[m : m + step].float()
            for n in range(0, len(weight), step):
                own = slice(n, n + step)
                y[m : m + step, own] = product(some, weight[own].float(), None if bias is None else bias[own].float())
    return y.view(*x.shape[:-1], -1)


def _is_autocast_to_widened(x, weight, bias):
    """Whether autocast would have torch multiply in a dtype that is faster widened. Otherwise the casts are autocast's
    own, which keeps those of weights."""
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") not in _widened_dtypes():
        return False
    operands = [t for t in (x, weight, bias) if t is not None]
    return _pays_widening(x, weight) and all(
        is_plain_cpu_tensor(t) and t.dtype in DTYPES and t.dtype != torch.float64 for t in operands
    )


def _pays_widening(x, weight):
    return x.numel() * len(weight) >= 1 << 22 and x.numel() >= _LEAST_WIDENED_ROWS * x.shape[-1]


def _is_few_rows(x, weight, bias):
    """Whether `linear_few_rows` takes these, of which x is a plain tensor, and nothing is recorded."""
    rows = _MOST_FEW_ROWS if x.dtype not in _widened_dtypes() else _LEAST_WIDENED_ROWS - 1
    return (
        0 < x.numel() <= rows * x.shape[-1]
        and x.dtype in _FEW_ROWS_DTYPES
        and _are_alike(x, weight, bias)
        and weight.dim() == 2
        and 1 in weight.stride()
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and not needs_function(x, weight, bias)
    )


def _is_taken(x, weight, bias):
    """Whether `_product` takes these, of which x is a plain tensor, and is faster than torch."""
    if x.dtype in _widened_dtypes():
        if not _pays_widening(x, weight):
            return False
    elif (
        (weight.numel() < 1 << 19 and x.numel() * len(weight) < 1 << 23)  # which costs less than oneDNN's call
        or x.dtype not in _onednn_dtypes()
        or not torch._C._get_mkldnn_enabled()
    ):
        return False
    return _are_alike(x, weight, bias)


def _are_alike(x, weight, bias):
    """Whether weight and bias are plain tensors too and fit x, outside autocast."""
    return (
        is_plain_cpu_tensor(weight)
        and x.dtype == weight.dtype
        and (bias is None or (bias.dtype == x.dtype and is_plain_cpu_tensor(bias)))
        and x.shape[-1] == weight.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def _onednn_dtypes():
    """Those that oneDNN's linear has a fast kernel for, on a CPU where torch does not have one as fast."""
    dtypes = set()
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            dtypes.add(torch.bfloat16)
        about = Path("/proc/cpuinfo")
        if about.exists() and "AuthenticAMD" in about.read_text():
            dtypes.add(torch.float32)
    return dtypes


@functools.cache
def _widened_dtypes():
    """The 16-bit dtypes that this CPU has no instructions for, where it multiplies float32 in vectors."""
    isas = _C.supported_isas()
    if "avx2" not in isas:
        return frozenset()
    has_float16 = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)()
    multiplied = {torch.bfloat16: "avx512bf16" in isas, torch.float16: has_float16}
    return frozenset(dtype for dtype, can in multiplied.items() if not can)


class _Linear(torch.autograd.Function):
    """Rows of x weightT + bias, or relu of them; so are the gradients' products, unless differentiated again."""

    @staticmethod
    def forward(x, weight, bias, relu):
        return _product(x, weight, bias, "relu" if relu else "none")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2], output if inputs[3] else None)

    @staticmethod
    def backward(ctx, grad):
        x, weight, positive = ctx.saved_tensors
        if positive is not None:
            grad = torch.ops.aten.threshold_backward(grad, positive, 0)
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if wants_x:
            grad_x = grad @ weight if torch.is_grad_enabled() else _product(grad, weight.t(), None)
        if wants_weight:
            grad_weight = grad.t() @ x if torch.is_grad_enabled() else _weight_gradient(grad, x, weight)
        return grad_x, grad_weight, grad.sum(0) if wants_bias else None, None
