"""residual_norm: raw operators, fake kernels, vmap, first and second derivatives. Tensors are (..., N) or (N)."""

import torch
from torch.autograd.function import once_differentiable

from ..arguments import check_norm
from ..reference import norm_dropout_mask
from ..reference.philox import keep_scale
from ..reference.residual_norm import normalize, residual_layer_norm, residual_rms_norm
from .recording import (
    by_short_way,
    call_backward,
    eager_apply,
    is_dtensor,
    is_eager,
    is_forward_mode,
    is_grad_enabled,
    is_plain_call,
    needs_function,
    require_grad,
)

_forward = torch.ops.tformer_ext._residual_norm_forward.default
_inference = by_short_way(torch.ops.tformer_ext._residual_norm_inference.default)
_backward = torch.ops.tformer_ext._residual_norm_backward.default


def residual_norm(x, residual, weight, bias, seed, eps, dropout_p, rms, want_sum, sum_dtype):
    """(y, sum) of x (..., N); sum is None unless want_sum."""
    if is_dtensor(x) or is_dtensor(residual):
        from ..distributed.dtensor import place_norm

        x, residual, weight, bias, seed = place_norm(x, residual, weight, bias, seed)
    tensors = (x, residual, weight, bias)
    if is_forward_mode():  # torch differentiates its own operations in any mode
        y, total = (residual_rms_norm if rms else residual_layer_norm)(
            *tensors, eps=eps, dropout_p=dropout_p, dropout_seed=seed, return_residual=True, residual_dtype=sum_dtype
        )
        return y, total if want_sum else None
    if needs_function(*tensors):
        # without residual and dropout, and in x's dtype, the sum is x itself and need not be saved again
        save_sum = want_sum or residual is not None or dropout_p > 0 or sum_dtype != x.dtype
        function = _eager_norm if is_eager() else ResidualNorm.apply
        y, total, *_ = function(*tensors, seed, eps, dropout_p, rms, save_sum, sum_dtype)
    else:
        y, total, _, _ = _forward(*tensors, seed, eps, dropout_p, rms, want_sum, sum_dtype)
    return y, total if want_sum else None


def plain_norm(x, residual, weight, bias, eps, rms, want_sum):
    """y of a plain call without dropout, or (y, sum), or None; as plain_attention."""
    if not is_plain_call():
        return None
    try:
        if residual is not None and residual.shape != x.shape:  # the operator looks at rows only
            return None
        recorded = is_grad_enabled() and require_grad(x, residual, weight, bias)
        if not recorded and not want_sum:
            return _inference(x, residual, weight, bias, eps, rms)
        if is_dtensor(x) or not (residual is None or residual.dtype == x.dtype):
            return None
        operands = (x, residual, weight, bias, None, eps, 0.0, rms, want_sum or residual is not None, None)
        y, total, *_ = _eager_norm(*operands) if recorded else _forward(*operands)
        return (y, total) if want_sum else y
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


def gradients_apart(dropout_p, x_dtype, residual_dtype):
    """Whether the gradient of the residual differs from that of x."""
    return residual_dtype is not None and (dropout_p > 0 or residual_dtype != x_dtype)


def _statistics_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("tformer_ext::_residual_norm_forward")
def _(
    x, residual=None, weight=None, bias=None, seed=None, eps=1e-5, dropout_p=0.0, rms=False, save_sum=False,
    sum_dtype=None,
):  # fmt: skip
    _, sum_dtype = check_norm(x, residual, weight, bias, sum_dtype)
    statistics = _statistics_dtype(x.dtype)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape if save_sum else (0,), dtype=sum_dtype),
        x.new_empty((0,) if rms else x.shape[:-1], dtype=statistics),
        x.new_empty(x.shape[:-1], dtype=statistics),
    )


@torch.library.register_fake("tformer_ext::_residual_norm_inference")
def _(x, residual, weight, bias, *_):
    check_norm(x, residual, weight, bias, None)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("tformer_ext::_residual_norm_backward")
def _(grad_y, grad_sum, total, mean, rstd, weight, seed, dropout_p, rms, x_dtype, residual_dtype, bias_dtype):
    N = grad_y.shape[-1]
    apart = gradients_apart(dropout_p, x_dtype, residual_dtype)
    nothing = grad_y.new_empty(0, dtype=x_dtype)
    return (
        grad_y.new_empty(grad_y.shape, dtype=x_dtype),
        grad_y.new_empty(grad_y.shape, dtype=residual_dtype) if apart else nothing,
        grad_y.new_empty(0, dtype=x_dtype) if weight is None else torch.empty_like(weight),
        grad_y.new_empty(0, dtype=x_dtype) if bias_dtype is None else grad_y.new_empty(N, dtype=bias_dtype),
    )


class ResidualNorm(torch.autograd.Function):
    """y and the sum that was normalised (empty if it is x itself), with the statistics saved for backward."""

    @staticmethod
    def forward(x, residual, weight, bias, seed, eps, dropout_p, rms, save_sum, sum_dtype):
        return _forward(x, residual, weight, bias, seed, eps, dropout_p, rms, save_sum, sum_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[2:])
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_y, grad_sum, _mean, _rstd):
        return _gradients(ctx, grad_y, grad_sum)

    @staticmethod
    def vmap(info, in_dims, *operands):
        return _vmap(ResidualNorm, info, in_dims, operands)


class EagerResidualNorm(torch.autograd.Function):
    """As ResidualNorm, for what neither traces nor transforms, as EagerAttention is.

    The sum stays an output wherever it is saved: second derivatives reach x and residual through it.
    """

    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, eps, dropout_p, rms, save_sum, sum_dtype):
        inputs = (x, residual, weight, bias, seed, eps, dropout_p, rms, save_sum, sum_dtype)
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output[:2] if save_sum else (output[0], None)

    @staticmethod
    def backward(ctx, grad_y, grad_sum):
        return _gradients(ctx, grad_y, grad_sum)


_eager_norm = eager_apply(EagerResidualNorm)


def _save(ctx, inputs, output):
    x, residual, weight, bias, seed, eps, dropout_p, rms, save_sum, _ = inputs
    _y, total, mean, rstd = output
    ctx.save_for_backward(total if save_sum else x, mean, rstd, weight, seed)
    residual_dtype, bias_dtype = None if residual is None else residual.dtype, None if bias is None else bias.dtype
    ctx.numbers, ctx.save_sum = (eps, dropout_p, rms, x.dtype, residual_dtype, bias_dtype), save_sum
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_y, grad_sum):
    total, mean, rstd, weight, seed = ctx.saved_tensors
    _eps, dropout_p, _rms, x_dtype, residual_dtype, bias_dtype = ctx.numbers
    if not ctx.save_sum:
        grad_sum = None
    if grad_y is None and grad_sum is None:
        return (None,) * 10
    if grad_y is None:
        grad_y = total.new_zeros(total.shape, dtype=x_dtype)
    grad_x, grad_residual, grad_weight, grad_bias = call_backward(
        ResidualNormBackward, grad_y, grad_sum, total, mean, rstd, weight, seed, *ctx.numbers
    )
    if residual_dtype is None:
        grad_residual = None
    elif not gradients_apart(dropout_p, x_dtype, residual_dtype):
        grad_residual = grad_x
    grad_weight = None if weight is None else grad_weight
    return grad_x, grad_residual, grad_weight, None if bias_dtype is None else grad_bias, *(None,) * 6


class ResidualNormBackward(torch.autograd.Function):
    """The gradients, themselves differentiable once: through the formula in torch operations."""

    @staticmethod
    def forward(
        grad_y,
        grad_sum,
        total,
        mean,
        rstd,
        weight,
        seed,
        eps,
        dropout_p,
        rms,
        x_dtype,
        residual_dtype,
        bias_dtype,
    ):
        if grad_y.dtype != x_dtype:
            grad_y = grad_y.to(x_dtype)
        if not grad_y.is_contiguous():
            grad_y = evenly_spaced_rows(grad_y)
        if grad_sum is not None and not grad_sum.is_contiguous():
            grad_sum = evenly_spaced_rows(grad_sum)
        return _backward(
            grad_y,
            grad_sum,
            total,
            mean,
            rstd,
            weight,
            seed,
            dropout_p,
            rms,
            x_dtype,
            residual_dtype,
            bias_dtype,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_y, grad_sum, total, _mean, _rstd, weight, seed, *ctx.numbers = inputs
        ctx.save_for_backward(grad_y, grad_sum, total, weight, seed)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_grad_x, grad_grad_residual, grad_grad_weight, grad_grad_bias):
        grad_y, grad_sum, total, weight, seed = ctx.saved_tensors
        eps, dropout_p, rms, x_dtype, residual_dtype, bias_dtype = ctx.numbers
        if all(g is None for g in (grad_grad_x, grad_grad_residual, grad_grad_weight, grad_grad_bias)):
            return (None,) * 13
        # never flattened to (M, N): a DTensor that is cut along a dimension in between cannot be
        inputs = [None if t is None else t.detach().requires_grad_() for t in (grad_y, grad_sum, total, weight)]
        gy, gs, h, w = inputs
        wide = _statistics_dtype(x_dtype)
        with torch.enable_grad():
            rows = h.to(wide)
            y = normalize(rows, w, None, eps, rms)
            wanted = [rows] if w is None else [rows, w]
            dh, *dw = torch.autograd.grad(y, wanted, gy.to(wide), create_graph=True)
            if gs is not None:
                dh = dh + gs.to(wide)
            pairs = [(grad_grad_residual, dh)] if gradients_apart(dropout_p, x_dtype, residual_dtype) else []
            if dropout_p > 0:
                if is_dtensor(total):
                    raise NotImplementedError("x: second derivatives with dropout are for plain tensors, got a DTensor")
                M, N = h.shape[:-1].numel(), h.shape[-1]
                kept = norm_dropout_mask(seed, M, N, dropout_p, device=h.device).view(h.shape)
                dh = dh * (kept.to(wide) * keep_scale(dropout_p))
            pairs.append((grad_grad_x, dh))
            pairs += [(grad_grad_weight, g) for g in dw]
            if bias_dtype is not None:
                row_dims = tuple(range(gy.dim() - 1))
                pairs.append((grad_grad_bias, gy.to(wide).sum(row_dims) if row_dims else gy.to(wide)))
            inner = sum((gg.to(g.dtype) * g).sum() for gg, g in pairs if gg is not None)
            present = [t for t in inputs if t is not None]
            seconds = iter(torch.autograd.grad(inner, present, allow_unused=True))
        grad_y, grad_sum, total, grad_weight = (None if t is None else next(seconds) for t in inputs)
        return grad_y, grad_sum, total, None, None, grad_weight, *(None,) * 7

    @staticmethod
    def vmap(info, in_dims, *operands):
        return _vmap(ResidualNormBackward, info, in_dims, operands)


def evenly_spaced_rows(t):
    """t, copied only where its rows do not lie at equal distances or are not contiguous."""
    if t.is_contiguous() or (t.dim() == 2 and t.stride(1) == 1):
        return t
    even = all(t.stride(d) == t.stride(d + 1) * t.shape[d + 1] for d in range(t.dim() - 2))
    return t if even and t.stride(-1) == 1 else t.contiguous()


def _vmap(function, info, in_dims, operands):
    """One call per entry: parameters may be mapped too, and dropout counts rows from 0 in each call."""
    results = []
    for index in range(info.batch_size):
        one = [
            x.select(dim, index).contiguous() if isinstance(x, torch.Tensor) and dim is not None else x
            for x, dim in zip(operands, in_dims, strict=True)
        ]
        results.append(function.apply(*one))
    return tuple(torch.stack(t) for t in zip(*results, strict=True)), (0,) * len(results[0])
