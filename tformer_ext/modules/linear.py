"""Linear layers of a Transformer layer, past what is slow in torch's own on a CPU.

Linear: products are those of ops/products.py where these are faster, with bias and activation, where torch writes the
bias first and adds the product to it. A few rows, which is what a model that generates multiplies, go to a kernel that
reads the weights as fast as memory gives them.
Everything that is no plain tensor on a CPU (subclasses, tracing, transforms, derivatives in forward mode, dispatch
modes) goes to torch, as does autocast to a dtype that the CPU multiplies unless the result is large.
"""

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..arguments import DTYPES
from ..ops import products
from ..ops.linear import linear_few_rows
from ..ops.products import ACTIVATIONS
from ..ops.recording import call, is_plain_cpu_tensor, needs_function
from .plain import is_plain

_PLAIN = (torch.Tensor, nn.Parameter)
_FEW_ROWS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_MULTIPLY_ADDS = 1 << 17  # with fewer, all that follows would cost more than it saves
_MOST_FEW_ROWS = 8  # with more, arithmetic begins to show beside reading the weights
_LEAST_WIDENED_ROWS = 16  # fewer do not pay for widening the weight


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
        return ACTIVATIONS[activation](nn.functional.linear(x, weight, bias))
    if _casts_for_autocast(x, weight, bias):
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return linear(*(None if t is None else t.to(dtype) for t in (x, weight, bias)), activation)
    if _is_few_rows(x, weight, bias):
        return ACTIVATIONS[activation](linear_few_rows(x.contiguous(), weight, bias))
    if not _is_taken(x, weight, bias):
        return ACTIVATIONS[activation](nn.functional.linear(x, weight, bias))
    if not needs_function(x, weight, bias):
        return products.product(x, weight, bias, activation)
    if x.dtype != torch.float32 and x.dtype not in products.widened_dtypes() and not products.is_large(x, weight):
        return ACTIVATIONS[activation](nn.functional.linear(x, weight, bias))
    # as rows: the operator returns a view of anything else, and a Function's views are not to be modified in place
    relu = activation == "relu"
    y = call(_Linear, x.reshape(-1, x.shape[-1]), weight, bias, relu).view(*x.shape[:-1], -1)
    return y if relu else ACTIVATIONS[activation](y)


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


def _casts_for_autocast(x, weight, bias):
    """Whether autocast is to a dtype that is faster widened, or of a result so large that it is not torch's. Otherwise
    the casts are autocast's own, which keeps those of weights."""
    if not torch.is_autocast_enabled("cpu"):
        return False
    dtype = torch.get_autocast_dtype("cpu")
    if dtype in products.widened_dtypes():
        pays = _pays_widening(x, weight)
    else:
        pays = products.is_faster_than_torch(dtype) and products.is_large(x, weight)
    operands = [t for t in (x, weight, bias) if t is not None]
    return pays and all(is_plain_cpu_tensor(t) and t.dtype in DTYPES and t.dtype != torch.float64 for t in operands)


def _pays_widening(x, weight):
    return x.numel() * len(weight) >= 1 << 22 and x.numel() >= _LEAST_WIDENED_ROWS * x.shape[-1]


def _is_few_rows(x, weight, bias):
    """Whether `linear_few_rows` takes these, of which x is a plain tensor, and nothing is recorded."""
    rows = _MOST_FEW_ROWS if x.dtype not in products.widened_dtypes() else _LEAST_WIDENED_ROWS - 1
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
    """Whether `product` takes these, of which x is a plain tensor, and is faster than torch."""
    if x.dtype in products.widened_dtypes():
        if not _pays_widening(x, weight):
            return False
    elif (
        (weight.numel() < 1 << 19 and x.numel() * len(weight) < 1 << 23)  # which costs less than oneDNN's call
        or not products.is_faster_than_torch(x.dtype)
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


class _Linear(torch.autograd.Function):
    """Rows of x weightT + bias, or relu of them; so are the gradients' products, unless differentiated again."""

    @staticmethod
    def forward(x, weight, bias, relu):
        return products.product(x, weight, bias, "relu" if relu else "none")

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
            grad_x = grad @ weight if torch.is_grad_enabled() else products.input_gradient(grad, x, weight)
        if wants_weight:
            grad_weight = grad.t() @ x if torch.is_grad_enabled() else products.weight_gradient(grad, x, weight)
        return grad_x, grad_weight, grad.sum(0) if wants_bias else None, None
