"""cross_entropy: which calls the kernels take, raw operators, fake kernels, autograd. On the CPU alone."""

import torch

from ..arguments import DTYPES
from ..reference.cross_entropy import cross_entropy as reference
from .recording import call, is_plain_cpu_tensor, needs_function

_forward = torch.ops.tformer_ext._cross_entropy_forward.default
_backward = torch.ops.tformer_ext._cross_entropy_backward.default

_LEAST_LOGITS, _LEAST_CLASSES = 1 << 16, 512  # with fewer, torch's own operations take no longer


def plain_cross_entropy(input, target, ignore_index, reduction, label_smoothing=0.0):
    """The loss of logits (M, N) for target (M,), float32, or float64 for float64; "none": (M,), else a scalar.

    None where the call is not one that the kernels are for, or that torch would refuse.
    """
    if reduction not in ("mean", "sum", "none") or not _is_taken(input, target):
        return None
    operands = input, target, ignore_index, label_smoothing
    try:
        losses = call(CrossEntropy, *operands) if needs_function(input) else _forward(*operands)[0]
    except RuntimeError:  # of a target that is no class, say: torch tells in its own words
        return None
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()  # NaN if none counts


def _is_taken(input, target):
    return (
        is_plain_cpu_tensor(input)
        and is_plain_cpu_tensor(target)
        and input.dim() == 2
        and input.shape[1] >= _LEAST_CLASSES
        and input.numel() >= _LEAST_LOGITS
        and input.dtype in DTYPES
        and input.stride(1) == 1
        and target.dtype == torch.int64
        and target.shape == input.shape[:1]
        and target.is_contiguous()
    )


def dtype_of_loss(input):
    return torch.float64 if input.dtype == torch.float64 else torch.float32


@torch.library.register_fake("tformer_ext::_cross_entropy_forward")
def _(input, target, ignore_index, label_smoothing):
    loss = input.new_empty(input.shape[:-1], dtype=dtype_of_loss(input))
    return loss, torch.empty_like(loss), torch.empty_like(loss)


@torch.library.register_fake("tformer_ext::_cross_entropy_backward")
def _(grad_loss, input, target, highest, total, ignore_index, label_smoothing):
    return input.new_empty(input.shape)


@torch.library.register_fake("tformer_ext::_cross_entropy_backward_")
def _(grad_loss, input, target, highest, total, ignore_index, label_smoothing):
    return None


class CrossEntropy(torch.autograd.Function):
    """The loss of each row. Of what softmax makes of the logits two numbers a row are kept."""

    @staticmethod
    def forward(ctx, input, target, ignore_index, label_smoothing):
        loss, *statistics = _forward(input, target, ignore_index, label_smoothing)
        ctx.save_for_backward(input, target, *statistics)
        ctx.options = ignore_index, label_smoothing
        return loss

    @staticmethod
    def backward(ctx, grad):
        input, target, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():  # differentiated again: through the formula
            ignore_index, label_smoothing = ctx.options
            loss = reference(input, target, ignore_index=ignore_index, label_smoothing=label_smoothing)
            (grad_input,) = torch.autograd.grad(loss, input, grad, create_graph=True)
        else:
            grad_input = _backward(grad.contiguous(), input, target, *statistics, *ctx.options)
        return grad_input, None, None, None
