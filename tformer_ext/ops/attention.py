"""attention: raw operators, fake kernels, vmap, first and second derivatives.

Operands are in the order of the schema (csrc/schema.cpp): eleven tensors or None (query, key, value, bias, mask,
alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, dropout_seed), then six numbers (causal, window_left,
window_right, scale, softcap, dropout_p).
"""

import torch
from torch.autograd.function import once_differentiable

from .. import reference
from ..arguments import CAUSAL, check_qkv, in_four_dimensions, same_device
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

_forward = torch.ops.tformer_ext._attention_forward.default
_inference = by_short_way(torch.ops.tformer_ext._attention_inference.default)
_backward = torch.ops.tformer_ext._attention_backward.default

# What may be left out of the operands of an eager call, from the right.
_NO_TENSORS = (None,) * 8
_NUMBERS = (0, -1, -1, None, 0.0, 0.0)

# Rows of scores that the double backward and derivatives in forward mode hold at a time.
_ROWS = 128


def attention(want_lse, *operands):
    """(out, lse) of the operands, lse None or of no use unless wanted; without a gradient straight to the operator."""
    if is_dtensor(operands[0]):
        from ..distributed.dtensor import place_attention

        operands = place_attention(operands)
    if is_forward_mode():
        return _by_formula(operands)
    if not needs_function(*operands[:7]):
        return _forward(*operands)
    if not is_eager():
        return Attention.apply(*operands)
    outputs = _eager_attention(want_lse, *operands)
    return outputs if want_lse else (outputs, None)


def plain_attention(query, key, value, bias, mask, causal, scale):
    """out of a plain call (`is_plain_call`) with these options only, or None where the operator does not take them.

    Checks are most of what a tiny call takes, so the operands have not been checked: the operator refuses what it
    cannot read, and the caller then finds out what was wrong with it.
    """
    if not is_plain_call():
        return None
    try:
        recorded = is_grad_enabled() and require_grad(query, key, value, bias)
        code = CAUSAL[causal]
        if bias is mask is scale is None:
            if not recorded:
                return _inference(query, key, value, code) if code else _inference(query, key, value)
            operands = (query, key, value, *_NO_TENSORS, code) if code else (query, key, value)
        elif scale is None or type(scale) is float:
            tensors = (query, key, value, in_four_dimensions(bias), in_four_dimensions(mask), *_NO_TENSORS[2:])
            operands = (*tensors, code, -1, -1, scale)
        else:
            return None
        if is_dtensor(query):
            return None
        return _eager_attention(False, *operands) if recorded else _forward(*operands)[0]
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError):
        return None


def _accumulator_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_in_order_of(like, sizes):
    """The memory order of `like`: dimensions 0 to 2 by falling stride, the last innermost."""
    order = sorted(range(3), key=lambda d: -like.stride(d))
    return torch.empty_permuted(sizes, (*order, 3), dtype=like.dtype, device=like.device)


@torch.library.register_fake("tformer_ext::_attention_forward")
def _(query, key, value, bias=None, mask=None, *_):
    check_qkv(query, key, value)
    for name, t in (("bias", bias), ("mask", mask)):
        if t is not None:
            same_device(name, t, query.device)
    B, Hq, Sq, _D = query.shape
    out = empty_in_order_of(query, (B, Hq, Sq, value.shape[3]))
    return out, query.new_empty((B, Hq, Sq), dtype=_accumulator_dtype(query.dtype))


@torch.library.register_fake("tformer_ext::_attention_inference")
def _(query, key, value, causal=0):
    check_qkv(query, key, value)
    return empty_in_order_of(query, (*query.shape[:3], value.shape[3]))


@torch.library.register_fake("tformer_ext::_attention_backward")
def _(grad_out, grad_lse, query, key, value, out, lse, bias, mask, alibi_slopes, sinks, *rest):
    bias_needs_grad = rest[4]
    grad_bias = torch.empty_like(bias, memory_format=torch.contiguous_format) if bias_needs_grad else None
    if grad_bias is None:
        grad_bias = query.new_empty(0, dtype=query.dtype if bias is None else bias.dtype)
    grad_sinks = query.new_empty(0, dtype=torch.float32) if sinks is None else torch.empty_like(sinks)
    grads = [empty_in_order_of(t, t.shape) for t in (query, key, value)]
    return (*grads, grad_bias, grad_sinks)


class Attention(torch.autograd.Function):
    """out and lse with a backward that needs neither the scores nor the weights to have been stored."""

    # every parameter by name: torch.compile counts them to tell whether there is a ctx among them
    @staticmethod
    def forward(
        query, key, value, bias, mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, dropout_seed,
        causal, window_left, window_right, scale, softcap, dropout_p,
    ):  # fmt: skip
        return _forward(
            query, key, value, bias, mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, dropout_seed,
            causal, window_left, window_right, scale, softcap, dropout_p,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:11], *output)
        ctx.numbers = inputs[11:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        *tensors, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 17
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        bias_needs_grad, sinks_need_grad = ctx.needs_input_grad[3], ctx.needs_input_grad[6]
        operands = (grad_out, grad_lse, out, lse, bias_needs_grad, *tensors, *ctx.numbers)
        grads = call_backward(AttentionBackward, *operands)
        return _in_order(grads, bias_needs_grad, sinks_need_grad)

    @staticmethod
    def vmap(info, in_dims, *operands):
        return _vmap(Attention, info, in_dims, operands, leading=0)


class EagerAttention(torch.autograd.Function):
    """As Attention, for what neither traces nor transforms: with half its time around the operator.

    Only what the caller sees is an output, an operand that is left out is nowhere, and there is no setup_context.
    """

    @staticmethod
    def forward(ctx, want_lse, *operands):
        out, lse = _forward(*operands)
        ctx.save_for_backward(out, lse, *operands[:11])
        ctx.numbers = operands[11:]
        ctx.set_materialize_grads(False)
        return (out, lse) if want_lse else out

    @staticmethod
    def backward(ctx, grad_out, grad_lse=None):
        out, lse, *tensors = ctx.saved_tensors
        needed, numbers = ctx.needs_input_grad, ctx.numbers
        if grad_out is None and grad_lse is None:
            return (None,) * len(needed)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if len(tensors) == 3:
            tensors += _NO_TENSORS
            bias_needs_grad = sinks_need_grad = False
        else:
            bias_needs_grad, sinks_need_grad = needed[4], needed[7]
        operands = (grad_out, grad_lse, out, lse, bias_needs_grad, *tensors, *numbers, *_NUMBERS[len(numbers) :])
        grads = _in_order(call_backward(AttentionBackward, *operands), bias_needs_grad, sinks_need_grad)
        return None, *grads[: len(needed) - 1]


_eager_attention = eager_apply(EagerAttention)


def _in_order(grads, bias_needs_grad, sinks_need_grad):
    """The gradients at the places of the operands."""
    query, key, value, bias, sinks = grads
    bias, sinks = bias if bias_needs_grad else None, sinks if sinks_need_grad else None
    return query, key, value, bias, None, None, sinks, *(None,) * 10


class AttentionBackward(torch.autograd.Function):
    """The gradients, themselves differentiable once: through the reference, a block of query rows at a time."""

    @staticmethod
    def forward(
        grad_out, grad_lse, out, lse, bias_needs_grad,
        query, key, value, bias, mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, dropout_seed,
        causal, window_left, window_right, scale, softcap, dropout_p,
    ):  # fmt: skip
        if grad_out.dtype != query.dtype:
            grad_out = grad_out.to(query.dtype)
        if grad_out.stride(-1) != 1 and grad_out.shape[-1] != 1:
            grad_out = grad_out.contiguous()
        if grad_lse is not None:
            grad_lse = grad_lse.contiguous()
        return _backward(
            grad_out, grad_lse, query, key, value, out, lse,
            bias, mask, alibi_slopes, sinks, key_lengths, cu_seqlens_q, cu_seqlens_k, dropout_seed, bias_needs_grad,
            causal, window_left, window_right, scale, softcap, dropout_p,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_out, grad_lse, _out, _lse, bias_needs_grad, *operands = inputs
        ctx.save_for_backward(grad_out, grad_lse, *operands[:11])
        ctx.bias_needs_grad = bias_needs_grad
        ctx.numbers = operands[11:]
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_grads):
        grad_out, grad_lse, *tensors = ctx.saved_tensors
        if is_dtensor(tensors[0]):
            raise NotImplementedError("query: second derivatives are for plain tensors, got a DTensor")
        grads = _double_backward(grad_grads, grad_out, grad_lse, tensors, ctx.numbers, ctx.bias_needs_grad)
        by_name = dict(zip(("grad_out", "grad_lse", "query", "key", "value", "bias", "sinks"), grads, strict=True))
        return (
            by_name["grad_out"],
            by_name["grad_lse"],
            None,
            None,
            None,
            by_name["query"],
            by_name["key"],
            by_name["value"],
            by_name["bias"],
            None,
            None,
            by_name["sinks"],
            *(None,) * 10,
        )

    @staticmethod
    def vmap(info, in_dims, *operands):
        return _vmap(AttentionBackward, info, in_dims, operands, leading=5)


def _vmap(function, info, in_dims, operands, leading):
    """Folds the mapped dimension into the batch where nothing else depends on the batch index, else loops."""
    n = info.batch_size
    dims = in_dims if isinstance(in_dims, tuple) else (in_dims,)
    tensors = operands[leading : leading + 11]
    query_dim = dims[leading]
    B = tensors[0].shape[0 if query_dim is None or query_dim > 0 else 1]
    foldable = all(t is None for t in (tensors[3], *tensors[5:7], *tensors[8:]))
    if foldable and n > 0:
        folded = [
            _fold(x, dim, n, B) if isinstance(x, torch.Tensor) else x for x, dim in zip(operands, dims, strict=True)
        ]
        outs = function.apply(*folded)
        outs = tuple(t.unflatten(0, (n, B)) if t.dim() > 1 else t.expand(n, *t.shape) for t in outs)
        return outs, (0,) * len(outs)
    results = []
    for index in range(n):
        one = [
            x.select(dim, index) if isinstance(x, torch.Tensor) and dim is not None else x
            for x, dim in zip(operands, dims, strict=True)
        ]
        results.append(function.apply(*one))
    return tuple(torch.stack(t) for t in zip(*results, strict=True)), (0,) * len(results[0])


def _fold(t, dim, n, B):
    """(n, B, ...) as (n * B, ...); an unmapped mask that is one for all batches stays as it is."""
    if dim is None and t.shape[0] == 1 and B != 1:
        return t
    t = t.unsqueeze(0).expand(n, *t.shape) if dim is None else t.movedim(dim, 0)
    if t.shape[1] == 1 and B != 1:
        t = t.expand(n, B, *t.shape[2:])
    return t.flatten(0, 1)


def _double_backward(grad_grads, grad_out, grad_lse, tensors, numbers, bias_needs_grad):
    """Gradients of <grad_grads, (dq, dk, dv, dbias, dsinks)> with respect to grad_out, grad_lse, q, k, v, bias, sinks.

    The inner product is a sum over query rows, so it is differentiated a block of rows at a time.
    """
    query, key, value, bias, mask, slopes, sinks, key_lengths, cu_q, cu_k, seed = tensors
    options = _options_of_formula(key_lengths, seed, numbers)
    gq, gk, gv, gbias, gsinks = grad_grads
    if not bias_needs_grad:
        gbias = None
    if sinks is None:
        gsinks = None
    inputs = {"grad_out": grad_out, "grad_lse": grad_lse, "query": query, "key": key, "value": value,
              "bias": bias, "sinks": sinks}  # fmt: skip
    total = {name: None if t is None else torch.zeros_like(t) for name, t in inputs.items()}
    by_rows = {"grad_out", "grad_lse", "query"} | ({"bias"} if bias is not None and bias.shape[2] > 1 else set())

    for n, rows, keys, first_row, total_rows in _row_blocks(query, key, cu_q, cu_k):
        part = {}
        for name, t in inputs.items():
            if t is not None:
                t = t[:, :, rows] if name in by_rows else t[:, :, keys] if name in ("key", "value") else t
            part[name] = None if t is None else t.detach().requires_grad_()
        block_slopes = _slopes_of(slopes, n, cu_q)
        with torch.enable_grad():
            out, lse = reference.attention_rows(
                part["query"], part["key"], part["value"], bias=part["bias"], mask=_rows_of(mask, rows),
                alibi_slopes=block_slopes, sinks=part["sinks"], first_row=first_row, total_rows=total_rows,
                first_batch=n, return_lse=True, **options,
            )  # fmt: skip
            outputs, cotangents = [out], [part["grad_out"]]
            if grad_lse is not None:
                outputs.append(torch.where(lse == -torch.inf, 0, lse))
                cotangents.append(part["grad_lse"])
            wanted = [
                (part["query"], None if gq is None else gq[:, :, rows]),
                (part["key"], None if gk is None else gk[:, :, keys]),
                (part["value"], None if gv is None else gv[:, :, keys]),
                (part["bias"], _rows_of(gbias, rows)),
                (part["sinks"], gsinks),
            ]
            wanted = [(t, g) for t, g in wanted if t is not None and g is not None]
            if not wanted:
                continue
            grads = torch.autograd.grad(
                outputs, [t for t, _ in wanted], cotangents, create_graph=True, allow_unused=True
            )
            terms = [(g * gg.to(g.dtype)).sum() for g, (_, gg) in zip(grads, wanted, strict=True) if g is not None]
            names = [name for name, t in part.items() if t is not None]
            wrt = [part[name] for name in names]
            seconds = torch.autograd.grad(sum(terms), wrt, allow_unused=True) if terms else [None] * len(wrt)
        for name, second in zip(names, seconds, strict=True):
            if second is not None:
                at = rows if name in by_rows else keys if name in ("key", "value") else None
                (total[name] if at is None else total[name][:, :, at]).add_(second)
    return tuple(total.values())


def _by_formula(operands):
    """(out, lse) in torch's operations, a block of query rows at a time: torch differentiates those in any mode."""
    query, key, value, bias, mask, slopes, sinks, key_lengths, cu_q, cu_k, seed = operands[:11]
    options = _options_of_formula(key_lengths, seed, operands[11:])
    blocks = []
    for n, rows, keys, first_row, total_rows in _row_blocks(query, key, cu_q, cu_k):
        block = reference.attention_rows(
            query[:, :, rows], key[:, :, keys], value[:, :, keys], bias=_rows_of(bias, rows), mask=_rows_of(mask, rows),
            alibi_slopes=_slopes_of(slopes, n, cu_q), sinks=sinks, first_row=first_row, total_rows=total_rows,
            first_batch=n, return_lse=True, **options,
        )  # fmt: skip
        blocks.append(block)
    if not blocks:
        shape = query.shape[:3]
        return query.new_zeros(*shape, value.shape[3]), query.new_zeros(shape, dtype=_accumulator_dtype(query.dtype))
    out, lse = (torch.cat(parts, 2) for parts in zip(*blocks, strict=True))
    return out, lse


def _options_of_formula(key_lengths, seed, numbers):
    causal, left, right, scale, softcap, dropout_p = numbers
    return {
        "causal": causal, "window": (left, right), "scale": scale, "softcap": softcap, "dropout_p": dropout_p,
        "dropout_seed": seed, "key_lengths": key_lengths,
    }  # fmt: skip


def _rows_of(operand, rows):
    """A bias or mask (or None) for these query rows."""
    return operand[:, :, rows] if operand is not None and operand.shape[2] > 1 else operand


def _slopes_of(slopes, n, cu_q):
    """alibi_slopes (or None) for sequence n, if sequences are packed."""
    return slopes[n] if cu_q is not None and slopes is not None and slopes.dim() == 2 else slopes


def _row_blocks(query, key, cu_q, cu_k):
    """(sequence, rows, keys, first row and number of rows in the sequence) of every block of query rows."""
    if cu_q is None:
        bounds = [(0, (0, query.shape[2]), (0, key.shape[2]))]
    else:
        q, k = cu_q.tolist(), cu_k.tolist()
        bounds = [(n, (q[n], q[n + 1]), (k[n], k[n + 1])) for n in range(len(q) - 1)]
    for n, (q0, q1), (k0, k1) in bounds:
        for start in range(q0, q1, _ROWS):
            yield n, slice(start, min(start + _ROWS, q1)), slice(k0, k1), start - q0, q1 - q0
