"""Linear layers and dropout of a Transformer layer, past what is slow in torch's own on a CPU.

Linear: torch multiplies float32 with MKL, which stays well below oneDNN's speed on CPUs other than Intel's, and writes
the bias first, then adds the product to it. oneDNN's linear takes bias and activation along.
Dropout: torch draws its random numbers one after the other; those of the residual norm come from counters, in vectors.
Everything that is no plain tensor on a CPU (subclasses, tracing, transforms, autocast, dispatch modes) goes to torch.
"""

import functools
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..arguments import DTYPES
from ..ops.recording import call, needs_function
from .residual_norm import is_plain

_residual_norm = torch.ops.tformer_ext._residual_norm_forward.default
_PLAIN = (torch.Tensor, nn.Parameter)


_ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu_, "gelu": nn.functional.gelu}


def linear(x, weight, bias, activation="none"):
    """activation(torch.nn.functional.linear(x, weight, bias)); activation "none", "relu" or (exact) "gelu"."""
    if not _is_for_onednn(x, weight, bias):
        return _ACTIVATIONS[activation](nn.functional.linear(x, weight, bias))
    if not needs_function(x, weight, bias):
        return _product(x, weight, bias, activation)
    if x.dtype != torch.float32:
        return _ACTIVATIONS[activation](nn.functional.linear(x, weight, bias))
    # as rows: the operator returns a view of anything else, and a Function's views are not to be modified in place
    relu = activation == "relu"
    y = call(_Linear, x.reshape(-1, x.shape[-1]), weight, bias, relu).view(*x.shape[:-1], -1)
    return y if relu else _ACTIVATIONS[activation](y)


def is_plain_linear(module):
    """Whether module does what torch.nn.Linear does and nothing else."""
    return is_plain(module, nn.Linear) or is_plain(module, NonDynamicallyQuantizableLinear)


def call_linear(module, x):
    """module(x), which may be any module."""
    return linear(x, module.weight, module.bias) if is_plain_linear(module) else module(x)


def _product(x, weight, bias, activation="none"):
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, [], "none")


def _is_for_onednn(x, weight, bias):
    """Whether oneDNN takes these, and is faster: not for small products, which cost less than its call."""
    if torch.compiler.is_compiling():
        return False
    if weight.numel() < 1 << 19 and x.numel() * weight.shape[0] < 1 << 23:
        return False
    return (
        _is_plain_tensor(x)
        and _is_plain_tensor(weight)
        and x.dtype == weight.dtype
        and (bias is None or (bias.dtype == x.dtype and _is_plain_tensor(bias)))
        and x.numel() > 0
        and x.shape[-1] == weight.shape[-1]
        and x.dtype in _onednn_dtypes()
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _is_plain_tensor(t):
    return (
        type(t) in _PLAIN
        and t.device.type == "cpu"
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
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


class _Linear(torch.autograd.Function):
    """Rows of x weightT + bias, or relu of them; gradients are oneDNN's products too, unless differentiated again."""

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
            # oneDNN wants the rows of its first operand in one piece: worth it where that copy is the smaller one
            copies = not torch.is_grad_enabled() and grad.shape[1] <= x.shape[1]
            grad_weight = _product(grad.t(), x.t(), None) if copies else grad.t() @ x
        return grad_x, grad_weight, grad.sum(0) if wants_bias else None, None


def add_dropout(x, dropout, residual=None):
    """residual + dropout(x); dropout may be any module or None, residual None."""
    if dropout is None or not is_plain(dropout, nn.Dropout):
        x = x if dropout is None else dropout(x)
        return x if residual is None else residual + x
    if not dropout.training or dropout.p == 0:
        return x if residual is None else residual + x
    plain = _is_plain_tensor(x) and x.dtype in DTYPES and x.is_contiguous() and not torch.compiler.is_compiling()
    if not plain or not (residual is None or (residual.dtype == x.dtype and residual.is_contiguous())):
        x = nn.functional.dropout(x, dropout.p)
        return x if residual is None else residual + x
    seed = torch.randint(0, 2**62, (), dtype=torch.int64)
    return call(_AddDropout, x, residual, seed, dropout.p)


class _AddDropout(torch.autograd.Function):
    """The sum that the residual norm makes before it normalises; what else it writes costs less than torch's draws."""

    @staticmethod
    def forward(x, residual, seed, dropout_p):
        return _residual_norm(x, residual, None, None, seed, 1e-5, dropout_p, True, True, None)[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])
        ctx.dropout_p = inputs[3]

    @staticmethod
    def backward(ctx, grad):
        (seed,) = ctx.saved_tensors
        grad_x = _AddDropout.apply(grad.contiguous(), None, seed, ctx.dropout_p) if ctx.needs_input_grad[0] else None
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None
