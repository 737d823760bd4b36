"""linear_cross_entropy: the loss of a linear layer's results, of which some rows exist at a time. On the CPU alone."""

import torch
from torch import nn

from ..arguments import DTYPES
from ..reference.cross_entropy import cross_entropy as reference
from .cross_entropy import dtype_of_loss
from .products import add_part, empty_matrix, large_parts, write_product
from .recording import call, is_plain_cpu_tensor, needs_function

_losses = torch.ops.tformer_ext._cross_entropy_forward.default
_into_gradient = torch.ops.tformer_ext._cross_entropy_backward_.default

_LEAST_CLASSES = 512
_LEAST_LOGITS = 1 << 20  # with fewer there is little to save, and so many operations take longer than few
_LINE_BYTES = 64
_ROW_BYTES = 2048  # of a column of the logits that are held: with fewer, adding up the weight's gradient would show


def plain_linear_cross_entropy(input, weight, bias, target, ignore_index, reduction, label_smoothing=0.0, divisor=None):
    """The loss of logits input (M, K) weightT (N, K) + bias (N) for target (M,): float32, or float64 for float64.

    divisor: a number or a tensor of one element that the sum of "sum" is divided by.
    None where the call is not one that this is for, or that torch would refuse.
    """
    if reduction not in ("mean", "sum", "none") or not _is_taken(input, weight, bias, target):
        return None
    if not isinstance(label_smoothing, float) or not 0 <= label_smoothing <= 1:
        return None
    counts = target != ignore_index
    if not torch.all((target >= 0) & (target < len(weight)) | ~counts):
        return None
    share = None
    if reduction != "none":
        parts = counts.sum() if reduction == "mean" else 1 if divisor is None else divisor
        share = torch.ones((), dtype=dtype_of_loss(input)) / parts
    tensors = input, weight, bias
    options = target, share, ignore_index, label_smoothing
    with torch.autocast("cpu", enabled=False):
        if needs_function(*tensors):
            return call(LinearCrossEntropy, *tensors, *options)
        losses = _run(*tensors, target, None, None, ignore_index, label_smoothing)[0]
    return losses if share is None else losses.sum() * share


def _is_taken(input, weight, bias, target):
    return (
        all(is_plain_cpu_tensor(t) for t in (input, weight, target))
        and (bias is None or (is_plain_cpu_tensor(bias) and bias.shape == weight.shape[:1]))
        and input.dim() == weight.dim() == 2
        and input.shape[1] == weight.shape[1] > 0
        and len(weight) >= _LEAST_CLASSES
        and len(input) * len(weight) >= _LEAST_LOGITS
        and input.dtype in DTYPES
        and all(t is None or t.dtype == input.dtype for t in (weight, bias))
        and target.dtype == torch.int64
        and target.shape == input.shape[:1]
    )


def _run(input, weight, bias, target, grad_losses, wanted, ignore_index, label_smoothing):
    """(losses (M), gradients of input, weight and bias): those that are wanted and only for grad_losses, else None.

    Logits of some rows are made, their losses are taken, they become their own gradient, and that is multiplied; then
    their memory is that of the next. What such parts add up to is of the dtype of losses until it is complete.
    """
    (M, K), N, wide = input.shape, len(weight), dtype_of_loss(input)
    wants_input, wants_weight, wants_bias = wanted if grad_losses is not None else (False,) * 3
    rows = _even_step(M, _ROW_BYTES // input.itemsize)
    classes = large_parts(N)
    target = target.contiguous()

    losses, memory = input.new_empty(M, dtype=wide), _rows_apart(input, rows, N)
    grad_input = empty_matrix(input, M, K, input.dtype) if wants_input else None
    grad_weight = empty_matrix(input, N, K, input.dtype) if wants_weight else None
    grad_bias = input.new_zeros(N, dtype=wide) if wants_bias else None
    of_x = empty_matrix(input, rows, K, wide) if wants_input else None
    of_weight = empty_matrix(input, N, K, wide) if wants_weight and input.dtype != wide and rows < M else grad_weight

    for m in range(0, M, rows):
        some = slice(m, m + rows)
        x, asked = input[some], target[some]
        logits = memory[: len(x)]
        for own in classes:
            write_product(logits[:, own], x, weight[own], None if bias is None else bias[own])
        losses[some], *statistics = _losses(logits, asked, ignore_index, label_smoothing)
        if grad_losses is not None:
            _into_gradient(grad_losses[some], logits, asked, *statistics, ignore_index, label_smoothing)
        for own in classes:
            grad, first, last = logits[:, own], own is classes[0], own is classes[-1]
            if wants_input:
                add_part(of_x[: len(x)], grad_input[some], first, last, grad, weight[own].t())
            if wants_weight:
                add_part(of_weight[own], grad_weight[own], m == 0, m + rows >= M, grad.t(), x.t())
            if wants_bias:
                grad_bias[own] += grad.sum(0, dtype=wide)
    return losses, grad_input, grad_weight, None if grad_bias is None else grad_bias.to(input.dtype)


def _rows_apart(like, rows, columns):
    """Rows whose starts are an odd number of cache lines apart: columns of them then lie in many sets of a cache."""
    lines = -(-columns * like.itemsize // _LINE_BYTES) | 1
    return empty_matrix(like, rows, lines * _LINE_BYTES // like.itemsize, like.dtype)[:, :columns]


def _even_step(size, most):
    """The step, at most `most`, that cuts size into the fewest parts, of about the same size."""
    return -(-size // -(-size // most))


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses times share, or, if that is None, each of them.

    Gradients of a sum are made along with it, while logits are at hand, as if its own were 1, which backward multiplies
    them by. Those of single losses are made in backward, from logits that are made again, as are all of float16, where
    small gradients vanish unless the loss that is differentiated has been scaled.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, target, share, ignore_index, label_smoothing):
        ctx.options = ignore_index, label_smoothing
        at_once = share is not None and input.dtype != torch.float16
        grad_losses = share.expand(len(input)).contiguous() if at_once else None
        losses, *grads = _run(input, weight, bias, target, grad_losses, ctx.needs_input_grad[:3], *ctx.options)
        ctx.save_for_backward(input, weight, bias, target, share, *(grads if at_once else ()))
        return losses if share is None else losses.sum() * share

    @staticmethod
    def backward(ctx, grad):
        input, weight, bias, target, share, *grads = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # differentiated again: through the formula
            grads = _by_formula((input, weight, bias), wanted, target, share, grad, *ctx.options)
        elif not grads:
            grad_losses = (grad if share is None else (grad * share).expand(len(input))).contiguous()
            with torch.autocast("cpu", enabled=False):
                grads = _run(input, weight, bias, target, grad_losses, wanted, *ctx.options)[1:]
        elif grad != 1:
            grads = [None if t is None else t * grad for t in grads]
        return *grads, None, None, None, None


def _by_formula(tensors, wanted, target, share, grad, ignore_index, label_smoothing):
    with torch.autocast("cpu", enabled=False):
        logits = nn.functional.linear(*tensors)
        losses = reference(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing)
        leaves = [t for t, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]
        loss = losses if share is None else losses.sum() * share
        grads = iter(torch.autograd.grad(loss, leaves, grad, create_graph=True))
    return [next(grads) if is_wanted else None for is_wanted in wanted]
