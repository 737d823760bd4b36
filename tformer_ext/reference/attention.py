"""softmax(scale * q kT + bias, masked) v in plain PyTorch."""

import math

import torch

from .philox import keep_scale, random_numbers, threshold

CAUSAL = {None: 0, False: 0, True: 1, "upper_left": 1, "lower_right": 2, 2: 2}  # 0 and 1 equal False and True


def visible_keys(Sq, Sk, *, causal=False, window=None, key_lengths=None, device=None, first_row=0, total_rows=None):
    """Which keys each query may attend to by position alone.

    Returns (mask, distance): bool (B or 1, 1, Sq, Sk), and int64 of the same shape, the distance d - j of key j from
    query i's diagonal d = i + offset. offset is 0 for "upper_left", else the number of keys minus that of queries,
    where key_lengths (B), if given, are the numbers of keys. `first_row` and `total_rows` place the Sq rows in a
    longer sequence.
    """
    rows = Sq if total_rows is None else total_rows
    lengths = torch.as_tensor([Sk] if key_lengths is None else key_lengths, device=device).long().view(-1, 1, 1, 1)
    i = torch.arange(first_row, first_row + Sq, device=device).view(1, 1, Sq, 1)
    j = torch.arange(Sk, device=device).view(1, 1, 1, Sk)
    distance = i + (0 if CAUSAL[causal] == 1 else lengths - rows) - j
    mask = (j < lengths) & torch.ones_like(distance, dtype=torch.bool)
    left, right = (-1, -1) if window is None else window
    if CAUSAL[causal]:
        mask = mask & (distance >= 0)
    if left >= 0:
        mask = mask & (distance <= left)
    if right >= 0:
        mask = mask & (distance >= -right)
    return mask, distance


def attention_dropout_mask(seed, B, H, Sq, Sk, p, *, device=None, first_row=0, first_batch=0):
    """True = kept, bool (B, H, Sq, Sk): a pure function of (seed, batch, query head, query, key)."""
    b = torch.arange(first_batch, first_batch + B, device=device).view(B, 1, 1, 1)
    h = torch.arange(H, device=device).view(1, H, 1, 1)
    i = torch.arange(first_row, first_row + Sq, device=device).view(1, 1, Sq, 1)
    j = torch.arange(Sk, device=device).view(1, 1, 1, Sk)
    return random_numbers(j, i, h, b, seed) >= threshold(p)


def attention(query, key, value, **options):
    """The specification of tformer_ext.functional.attention: same keywords, shapes and results."""
    return attention_rows(query, key, value, first_row=0, total_rows=query.shape[2], **options)


def attention_rows(
    query, key, value, *, first_row, total_rows, first_batch=0, return_lse=False,
    sinks=None, dropout_p=0.0, dropout_seed=None, **options,
):  # fmt: skip
    """Rows [first_row, first_row + query.shape[2]) of an attention whose queries number total_rows.

    bias and mask belong to these rows alone; first_batch is the batch index that dropout counts from.
    """
    B, Hq, Sq, _ = query.shape
    scores, visible = attention_scores(query, key, first_row=first_row, total_rows=total_rows, **options)
    weights, lse = _softmax(scores, visible, sinks)
    if dropout_p > 0:
        kept = attention_dropout_mask(
            dropout_seed, B, Hq, Sq, key.shape[2], dropout_p, device=query.device, first_row=first_row,
            first_batch=first_batch,
        )  # fmt: skip
        weights = weights * (kept.to(weights.dtype) * keep_scale(dropout_p))
    out = _weighted_sum(weights.to(query.dtype), _for_each_query_head(value, Hq), visible)
    return (out, lse) if return_lse else out


def attention_scores(
    query, key, *, first_row, total_rows, bias=None, mask=None, causal=False, window=None, alibi_slopes=None,
    key_lengths=None, scale=None, softcap=0.0,
):  # fmt: skip
    """What the softmax is taken of: (scores, visible), both (B, Hq, Sq, Sk), -inf and False where a key is hidden."""
    B, Hq, Sq, D = query.shape
    Sk = key.shape[2]
    # the softmax of 16-bit inputs is held in float32
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    key = _for_each_query_head(key, Hq)
    visible, distance = visible_keys(
        Sq, Sk, causal=causal, window=window, key_lengths=key_lengths, device=query.device,
        first_row=first_row, total_rows=total_rows,
    )  # fmt: skip
    if mask is not None:
        visible = visible & mask
    visible = visible.expand(B, Hq, Sq, Sk)

    def scores_of(visible):
        scores = _products(query, key, visible).to(accumulate) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias.to(accumulate)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.to(accumulate).view(-1, Hq, 1, 1) * distance.abs()
        return scores.masked_fill(~visible, -math.inf)

    with torch.no_grad():
        visible = scores_of(visible) != -math.inf  # a key with a score of -inf takes no part
    return scores_of(visible), visible


def _for_each_query_head(t, Hq):
    return t if t.shape[1] == Hq else t.repeat_interleave(Hq // t.shape[1], 1)


def _products(query, key, visible):
    """q kT; a hidden pair's product is never looked at, and must not carry NaN into a gradient."""
    if _finite(query) and _finite(key):
        return query @ key.transpose(-1, -2)
    both = visible.unsqueeze(-1)
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return (torch.where(both, query.unsqueeze(-2), zero) * torch.where(both, key.unsqueeze(-3), zero)).sum(-1)


def _softmax(scores, visible, sinks):
    """Weights over keys (and the sink) and their log-sum-exp; dead rows: zeros and -inf."""
    alive = visible.any(-1, keepdim=True)
    safe = torch.where(alive, scores, torch.zeros_like(scores))
    if sinks is not None:
        logits = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        safe = torch.cat([safe, logits], -1)
    # a row without keys and sink has nothing to sum
    lse = safe.logsumexp(-1, keepdim=True) if safe.shape[-1] else safe.sum(-1, keepdim=True)
    lse = torch.where(lse == math.inf, math.nan, lse)  # inf - inf: the whole row is NaN
    weights = torch.exp(torch.where(visible, scores, torch.zeros_like(scores)) - lse)
    weights = torch.where(visible, weights, torch.zeros_like(weights))
    return weights, torch.where(alive, lse, torch.full_like(lse, -math.inf)).squeeze(-1)


def _weighted_sum(weights, value, visible):
    """weights v over the visible keys alone: a hidden key's value may be anything."""
    if _finite(value):
        return weights @ value
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    return (weights.unsqueeze(-1) * torch.where(visible.unsqueeze(-1), value.unsqueeze(-3), zero)).sum(-2)


def _finite(t):
    return bool(torch.isfinite(t.detach()).all())


def attention_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, *, alibi_slopes=None, **options):
    """The specification of tformer_ext.functional.attention_varlen: one `attention` per sequence.

    Dropout takes the sequence's index for the batch index, and positions inside the sequence.
    """
    return_lse = options.pop("return_lse", False)
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for n in range(len(q_bounds) - 1):
        q = query[q_bounds[n] : q_bounds[n + 1]].transpose(0, 1).unsqueeze(0)
        k, v = (t[k_bounds[n] : k_bounds[n + 1]].transpose(0, 1).unsqueeze(0) for t in (key, value))
        slopes = alibi_slopes[n] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        rows = {"first_row": 0, "total_rows": q.shape[2], "first_batch": n}
        out, lse = attention_rows(q, k, v, alibi_slopes=slopes, return_lse=True, **rows, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    out = torch.cat(outs) if outs else query.new_zeros(0, query.shape[1], value.shape[2])
    lse = torch.cat(lses, -1) if lses else query.new_zeros(query.shape[1], 0, dtype=torch.float32)
    return (out, lse) if return_lse else out
