"""The fused operations as functions. In shapes: B batch, H heads (Hq of queries, Hk of keys), S length, D head size."""

import torch

from . import arguments as check
from .ops import attention as _attention
from .ops import residual_norm as _norm
from .ops.cross_entropy import plain_cross_entropy as _plain_cross_entropy
from .ops.linear_cross_entropy import plain_linear_cross_entropy as _plain_linear_cross_entropy

__all__ = [
    "attention",
    "attention_varlen",
    "cross_entropy",
    "linear_cross_entropy",
    "residual_layer_norm",
    "residual_rms_norm",
    "scaled_dot_product_attention",
]


def _autocast(*tensors):
    """Under autocast, matrix products run in its dtype: float32 and 16-bit inputs are cast to it."""
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "cpu"
    # the devices by name: torch.compile of torch 2.11 cannot trace torch.amp.is_autocast_available
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in eligible else t for t in tensors)


def attention(
    query,
    key,
    value,
    *,
    bias=None,
    mask=None,
    causal=False,
    window=None,
    alibi_slopes=None,
    sinks=None,
    key_lengths=None,
    scale=None,
    softcap=0.0,
    dropout_p=0.0,
    dropout_seed=None,
    return_lse=False,
):
    """softmax(scale * query keyT + bias, masked) value, without holding the Sq x Sk scores.

    Args:
        query: (B, Hq, Sq, D), float64, float32, bfloat16 or float16. Strides are free as long as the last dimension is
            contiguous: transposed and packed projections are read in place.
        key: (B, Hk, Sk, D), value: (B, Hk, Sk, Dv), same dtype and device. Hq is a multiple of Hk: query head h reads
            key head h // (Hq // Hk).
        bias: floating, broadcasts to (B, Hq, Sq, Sk), added to the scaled scores; its gradient has its own shape.
        mask: bool, broadcasts likewise, True = may attend. Combines with bias, causal, window and key_lengths.
        causal: True or "upper_left": query i sees keys <= i. "lower_right": keys <= i + Sk - Sq, as in decoding.
        window: (left, right) keys seen on either side of the diagonal of the same alignment (lower right without
            causal), -1 = unbounded.
        alibi_slopes: (Hq,) or (B, Hq), constants m of the bias -m * |distance to the diagonal|.
        sinks: (Hq,) floating: a logit that takes weight in the softmax of its head and has no value; differentiable.
        key_lengths: (B,) int: only the first key_lengths[b] keys exist; Sk of the rules above is then that number.
        scale: factor of the scores; None = 1 / sqrt(D).
        softcap: c > 0 makes each scaled score c * tanh(score / c), before bias and masks.
        dropout_p: probability with which a weight is dropped, taken as a multiple of 2**-16; the others grow by
            1 / (1 - p).
        dropout_seed: int or int64 tensor of one element that fixes the dropped weights; None draws one from torch's
            default generator.
        return_lse: also return the log-sum-exp of each row.

    Returns:
        (B, Hq, Sq, Dv) in query's dtype and memory order; with return_lse also float32 (float64 for float64)
        (B, Hq, Sq), natural logarithm, sink included. Both are differentiable, twice.
        A query that may attend to no key gets 0, and -inf. Keys with a score of -inf take no part at all.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: for a device without kernels; on CUDA, for head dimensions above 256.

    Sources: Vaswani et al. 2017; Milakov & Gimelshein 2018 (online softmax); Dao et al. 2022 (tiling, recomputation);
    Ainslie et al. 2023 (grouped queries); Press et al. 2022 (ALiBi); Xiao et al. 2024 (sinks); Gemma 2 (softcap).
    """
    if (
        window is alibi_slopes is sinks is key_lengths is dropout_seed is None
        and return_lse is False
        and softcap == dropout_p == 0.0
    ):
        out = _attention.plain_attention(query, key, value, bias, mask, causal, scale)
        if out is not None:
            return out
    query, key, value = _autocast(query, key, value)
    check.check_qkv(query, key, value)
    check.device_is_served(query)
    check.head_dims_are_served(query, value)
    device, D = query.device, query.shape[3]
    B, Hq, Sq, Sk = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
    left, right = (-1, -1) if window is None else check.window_pair(window)
    dropout_p = 0.0 if dropout_p == 0.0 else check.probability("dropout_p", dropout_p)
    if bias is not None:
        bias = check.score_operand("bias", bias, (B, Hq, Sq, Sk))
        check.same_device("bias", bias, device)
    if mask is not None:
        mask = check.score_operand("mask", mask, (B, Hq, Sq, Sk))
        check.same_device("mask", mask, device)
    out, lse = _attention.attention(
        return_lse,
        check.unit_stride(query),
        check.unit_stride(key),
        check.unit_stride(value),
        bias,
        mask,
        check.alibi(alibi_slopes, B, Hq, device),
        check.sink_logits(sinks, Hq, device),
        check.lengths(key_lengths, B, Sk, device),
        None,
        None,
        check.seed_tensor(dropout_seed, dropout_p, device),
        check.causal_code(causal),
        left,
        right,
        check.scale_value(scale, D),
        check.softcap_value(softcap),
        dropout_p,
    )
    return (out, lse) if return_lse else out


def attention_varlen(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    *,
    causal=False,
    window=None,
    alibi_slopes=None,
    sinks=None,
    scale=None,
    softcap=0.0,
    dropout_p=0.0,
    dropout_seed=None,
    return_lse=False,
):
    """attention over sequences of different lengths packed one after the other, without padding.

    Args:
        query: (total queries, Hq, D), key: (total keys, Hk, D), value: (total keys, Hk, Dv).
        cu_seqlens_q, cu_seqlens_k: int32 or int64 (sequences + 1): sequence n has the rows cu_seqlens[n] up to
            cu_seqlens[n + 1]; the first entry is 0, the last the total.
        alibi_slopes: (Hq,) or (sequences, Hq).
        The other keywords, the errors and the sources are those of `attention`, each sequence for itself.

    Returns:
        (total queries, Hq, Dv); with return_lse also (Hq, total queries).
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions (total, H, D), got {t.dim()}: {tuple(t.shape)}")
    query, key, value = (t.unsqueeze(0).transpose(1, 2) for t in _autocast(query, key, value))
    check.check_qkv(query, key, value)
    check.device_is_served(query)
    check.head_dims_are_served(query, value)
    device, Hq = query.device, query.shape[1]
    cu_q = check.cumulative("cu_seqlens_q", cu_seqlens_q, query.shape[2], device)
    cu_k = check.cumulative("cu_seqlens_k", cu_seqlens_k, key.shape[2], device, size=cu_q.shape[0])
    left, right = check.window_pair(window)
    dropout_p = check.probability("dropout_p", dropout_p)
    out, lse = _attention.attention(
        return_lse,
        check.unit_stride(query),
        check.unit_stride(key),
        check.unit_stride(value),
        None,
        None,
        check.alibi(alibi_slopes, cu_q.shape[0] - 1, Hq, device),
        check.sink_logits(sinks, Hq, device),
        None,
        cu_q,
        cu_k,
        check.seed_tensor(dropout_seed, dropout_p, device),
        check.causal_code(causal),
        left,
        right,
        check.scale_value(scale, query.shape[3]),
        check.softcap_value(softcap),
        dropout_p,
    )
    out = out.transpose(1, 2).squeeze(0)
    return (out, lse.squeeze(0)) if return_lse else out


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """torch.nn.functional.scaled_dot_product_attention: same arguments, shapes and results.

    Args:
        query (..., Hq, L, E), key (..., H, S, E), value (..., H, S, Ev), leading dimensions broadcast; attn_mask bool
        (True = attend) or floating, broadcasts to (..., Hq, L, S). is_causal is the upper-left alignment and combines
        with attn_mask. enable_gqa allows Hq to be a multiple of H.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.dim() < 2:
            raise ValueError(f"{name}: expected at least 2 dimensions (..., L, E), got {tuple(t.shape)}")
    options = {"scale": scale, "dropout_p": dropout_p, "causal": bool(is_causal)}
    if query.dim() == key.dim() == value.dim() == 4:
        B, Hq, L, _ = query.shape
        if B == key.shape[0] == value.shape[0] and (enable_gqa or Hq == key.shape[1] == value.shape[1]):
            options |= _mask_option(attn_mask, (B, Hq, L, key.shape[2]))
            return attention(query, key, value, **options)
    heads = [t.shape[-3] if t.dim() > 2 else 1 for t in (query, key, value)]
    if not enable_gqa and any(h != heads[0] and h != 1 and heads[0] != 1 for h in heads):
        raise ValueError(
            f"key: expected {heads[0]} heads as in query, got {heads[1]} (value {heads[2]}); grouped queries need "
            "enable_gqa=True"
        )
    lead = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
    if not enable_gqa:
        heads = [max(heads) if min(heads) > 0 else 0] * 3

    def fold(t, h):
        """(..., h, L, E) as (B, h, L, E), a view wherever strides allow."""
        t = t.unsqueeze(0) if t.dim() == 2 else t
        t = t.expand(*lead, h, *t.shape[-2:])
        return t.reshape(-1, *t.shape[-3:]) if len(lead) != 1 else t

    q, k, v = (fold(t, h) for t, h in zip((query, key, value), heads, strict=True))
    for name, t in _mask_option(attn_mask, (*lead, heads[0], query.shape[-2], key.shape[-2])).items():
        if t.dim() > 3 and len(lead) != 1:
            # only the leading dimensions have to be folded; what is broadcast inside stays broadcast
            t = t.expand(*lead, *t.shape[-3:]).reshape(-1, *t.shape[-3:])
        options[name] = t
    out = attention(q, k, v, **options)
    shape = (*lead, heads[0]) if query.dim() > 2 or key.dim() > 2 or value.dim() > 2 else ()
    return out if len(lead) == 1 else out.reshape(*shape, query.shape[-2], value.shape[-1])


def _mask_option(attn_mask, full):
    """attn_mask, which has to broadcast to `full`, as an option of `attention`."""
    if attn_mask is None:
        return {}
    if not check.broadcasts(attn_mask.shape, full):
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {full}, got {tuple(attn_mask.shape)}")
    return {"mask" if attn_mask.dtype == torch.bool else "bias": attn_mask}


def residual_layer_norm(
    x,
    residual=None,
    weight=None,
    bias=None,
    *,
    eps=1e-5,
    dropout_p=0.0,
    dropout_seed=None,
    return_residual=False,
    residual_dtype=None,
):
    """LayerNorm(residual + dropout(x)) in one pass over memory.

    Args:
        x: (..., N), float64, float32, bfloat16 or float16.
        residual: the shape of x, its dtype or float32; None = 0.
        weight, bias: the last dimensions of x, which are normalised together (the last one if both are None); any
            floating dtype.
        eps: added to the variance.
        dropout_p, dropout_seed: as in `attention`; the mask is a function of (seed, row, column).
        return_residual: also return the sum h = residual + dropout(x), for a pre-norm block to go on with.
        residual_dtype: dtype of h, x's or float32; None = that of x and residual promoted.

    Returns:
        y of x's shape and dtype, or (y, h). h is rounded to its dtype before it is normalised.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `attention`.

    Mean, then squared distances from it, both in float32 (float64 for float64), never E[x^2] - mean^2.
    Source: Ba, Kiros, Hinton 2016.
    """
    return _residual_norm(
        x, residual, weight, bias, False, eps, dropout_p, dropout_seed, return_residual, residual_dtype
    )


def residual_rms_norm(
    x,
    residual=None,
    weight=None,
    bias=None,
    *,
    eps=1e-5,
    dropout_p=0.0,
    dropout_seed=None,
    return_residual=False,
    residual_dtype=None,
):
    """RMSNorm(residual + dropout(x)): residual_layer_norm without the mean. Source: Zhang & Sennrich 2019."""
    return _residual_norm(
        x, residual, weight, bias, True, eps, dropout_p, dropout_seed, return_residual, residual_dtype
    )


def _residual_norm(x, residual, weight, bias, rms, eps, dropout_p, seed, return_residual, residual_dtype):
    if dropout_p == 0.0 and seed is residual_dtype is None:
        out = _norm.plain_norm(x, residual, weight, bias, eps, rms, return_residual)
        if out is not None:
            return out
    if isinstance(x, torch.Tensor) and x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        x = x.float()  # as torch's norms do there
    dims, sum_dtype = check.check_norm(x, residual, weight, bias, residual_dtype)
    check.device_is_served(x, "x", "residual_norm")
    dropout_p = 0.0 if dropout_p == 0.0 else check.probability("dropout_p", dropout_p)
    seed = check.seed_tensor(seed, dropout_p, x.device)
    shape = x.shape

    def rows(t):
        return None if t is None else _norm.evenly_spaced_rows(t if dims == 1 else t.flatten(-dims))

    rest = rows(residual)
    if rest is not None and rest.dtype != sum_dtype:
        rest = rest.to(sum_dtype)
    y, total = _norm.residual_norm(
        rows(x),
        rest,
        None if weight is None else weight.flatten().contiguous(),
        None if bias is None else bias.flatten().contiguous(),
        seed,
        float(eps),
        dropout_p,
        rms,
        return_residual,
        sum_dtype,
    )
    if dims > 1:
        y, total = y.view(shape), None if total is None else total.view(shape)
    return (y, total) if return_residual else y


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    """torch.nn.functional.cross_entropy: its signature, results and errors.

    On a CPU logits of many classes are read once in each direction, and of their softmax only two numbers a row are
    kept; torch makes a whole one, widens 16-bit logits first if it is told to, and clears a gradient to scatter into.

    Args:
        input: logits, (M, N), float64, float32, bfloat16 or float16, rows contiguous.
        target: (M,) int64, classes 0 to N - 1 or ignore_index.
        ignore_index: rows with this target have loss and gradient 0 and do not count in the mean.
        reduction: "mean", "sum" or "none".
        label_smoothing: the part of the target, 0 to 1, that all classes share.
        weight, size_average, reduce: as in torch, which takes these calls, as it takes other shapes of input and
            target, probabilities as target, few logits, other devices, and what torch.compile or torch.func traces.

    Returns:
        A scalar, or (M,) for "none", of input's dtype; float32 under autocast. Sums are float32 or wider inside.

    Derivatives: first and second, the latter through the formula.
    """
    if weight is size_average is reduce is None:
        loss = _plain_cross_entropy(input, target, ignore_index, reduction, label_smoothing)
        if loss is not None:
            return loss if torch.is_autocast_enabled("cpu") else loss.to(input.dtype)
    return torch.nn.functional.cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    )


def linear_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=None,
    label_smoothing=0.0,
    options=None,
):
    """cross_entropy(linear(input, linear_weight, linear_bias), target) without holding the logits of all rows.

    torch.nn.functional.linear_cross_entropy of torch 2.13 and later: its signature, results and errors. On a CPU 512
    rows of logits exist at a time. Where a gradient is wanted they become their own gradient in place, which is
    multiplied at once, so that backward has nothing left to do; for "none" and in float16 backward makes them again.

    Args:
        input: (M, K), linear_weight: (N, K), linear_bias: (N,) or None, all of one dtype: float64, float32, bfloat16 or
            float16.
        target: (M,) int64, classes 0 to N - 1 or ignore_index.
        ignore_index: rows with this target have loss and gradient 0 and do not count in the mean; None: -100.
        reduction, label_smoothing: as in `cross_entropy`.
        weight, options: as in torch, which takes these calls, as it takes other shapes of input and linear_weight,
            probabilities as target, few logits, other devices, and what torch.compile or torch.func traces.

    Returns:
        A scalar, or (M,) for "none", of input's dtype; float32 under autocast. Losses and sums are float32 or wider
        inside; products of 16-bit operands are rounded to 16 bits before they are added, 1008 classes and 1024 rows
        each.

    Derivatives: first, any number of times if the graph is retained, and second, the latter through all logits.

    Raises:
        NotImplementedError: where the call is torch's and torch is older than 2.13 and options are given or
            linear_weight has more than two dimensions.
    """
    if weight is options is None and isinstance(input, torch.Tensor):
        operands = _autocast(input, linear_weight, linear_bias)
        ignored = -100 if ignore_index is None else ignore_index
        loss = _plain_linear_cross_entropy(*operands, target, ignored, reduction, label_smoothing)
        if loss is not None:
            return loss if torch.is_autocast_enabled("cpu") else loss.to(input.dtype)
    keywords = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        keywords |= {"linear_bias": linear_bias, "ignore_index": ignore_index, "options": options}
        return torch.nn.functional.linear_cross_entropy(input, linear_weight, target, **keywords)
    if options is not None or linear_weight.dim() != 2:
        raise NotImplementedError("linear_cross_entropy: options and weights of more dimensions need torch 2.13")
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    keywords["ignore_index"] = -100 if ignore_index is None else ignore_index
    return torch.nn.functional.cross_entropy(logits, target, **keywords)
