"""The gradient as any kernel without stored weights has to take it, in plain PyTorch: p = exp(score - lse),
ds = p (dp - delta + dlse). Beside autograd through the reference it tells what this form costs in a dtype."""

import torch
from cases import FLOATING, gradients, in_dtype

from tformer_ext import reference
from tformer_ext.reference.attention import attention_dropout_mask, attention_scores
from tformer_ext.reference.philox import keep_scale


def recomputed_gradients(qkv, options, cotangents, rounded_to=None):
    """Gradients of query, key, value, bias, sinks, as cases.gradients gives them.

    rounded_to: inf or -inf to take lse one representable number up or down, which is what saving it may cost.
    """
    query, key, value = qkv
    out, lse = reference.attention(*qkv, **options, return_lse=True)
    out, lse = out.detach(), lse.detach()
    if rounded_to is not None:
        lse = torch.where(lse.isfinite(), torch.nextafter(lse, torch.full_like(lse, rounded_to)), lse)
    own = ("sinks", "dropout_p", "dropout_seed")  # what comes after the scores
    rest = {k: v for k, v in options.items() if k not in own}
    scores, visible = attention_scores(query, key, first_row=0, total_rows=query.shape[2], **rest)
    group = query.shape[1] // key.shape[1]
    grad_out = cotangents[0].to(out.dtype)
    with torch.no_grad():
        alive = torch.where(lse == -torch.inf, 0, lse).unsqueeze(-1)
        p = torch.where(visible, torch.exp(scores - alive), 0)
        keep = 1.0
        if options.get("dropout_p"):
            kept = attention_dropout_mask(options["dropout_seed"], *p.shape, options["dropout_p"])
            keep = kept.to(p.dtype) * keep_scale(options["dropout_p"])
        dp = (grad_out @ value.repeat_interleave(group, 1).transpose(-1, -2)).to(p.dtype) * keep
        delta = (grad_out.to(p.dtype) * out.to(p.dtype)).sum(-1) - cotangents[1].to(p.dtype)
        delta = torch.where(lse == -torch.inf, 0, delta)
        ds = torch.where(visible, p * (dp - delta.unsqueeze(-1)), 0)
        dv = (p * keep).to(out.dtype).transpose(-1, -2) @ grad_out
        dv = dv.unflatten(1, (-1, group)).sum(2)
    leaves = [query, key] + ([options["bias"]] if "bias" in options else [])
    grads = torch.autograd.grad(torch.where(visible, scores, 0), leaves, ds)
    result = [*grads[:2], dv, *grads[2:]]
    if "sinks" in options:
        sink = torch.exp(options["sinks"].detach().to(p.dtype).view(1, -1, 1) - alive.squeeze(-1))
        result.append(-(torch.where(lse == -torch.inf, 0, sink) * delta).sum((0, 2)).to(options["sinks"].dtype))
    assert len(result) == 3 + sum(k in options for k in FLOATING)
    return tuple(result)


def _permuted(qkv):
    """Features in several orders: [(query, key, value), order of the values, orders that take both back]."""
    D, Dv = qkv[0].shape[3], qkv[2].shape[3]
    for seed in range(8):
        draw = torch.Generator("cpu").manual_seed(seed)
        order, order_v = (torch.randperm(n, generator=draw, device="cpu") for n in (D, Dv))
        permuted = [t[..., o] for t, o in zip(qkv, (order, order, order_v), strict=True)]
        yield permuted, order_v, order.argsort(), order_v.argsort()


def forward_yardsticks(qkv, options, dtype):
    """The same maths in dtype with sums in several orders: [(out, lse), ...]."""
    results = []
    for permuted, _, _, back_v in _permuted(qkv):
        given, keywords = in_dtype(permuted, options, dtype)
        out, lse = reference.attention(*given, **keywords, return_lse=True)
        results.append((out[..., back_v], lse))
    return results


def in_two_slices(t):
    """What float32 products on tensor cores take t for: two numbers of 11 bits, the second cut off."""
    high = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    low = ((t - high).view(torch.int32) & ~0x1FFF).view(torch.float32)
    return high + low


def yardsticks(qkv, options, cotangents, dtype):
    """The same maths in dtype: with sums in several orders (features permuted), each gradient taken in both forms, and
    lse, which decides all weights of a row, as it is and rounded the other way.

    Returns [(out, lse, (gradients)), ...], permuted back.
    """
    results = []
    roundings = (None, torch.inf, -torch.inf, None, torch.inf, -torch.inf, torch.inf, -torch.inf)
    for (permuted, order_v, back, back_v), rounded_to in zip(_permuted(qkv), roundings, strict=True):
        leaves, keywords = in_dtype(permuted, options, dtype, True)
        cotangent = (cotangents[0][..., order_v], cotangents[1])
        (out, lse), direct = gradients(reference.attention, leaves, keywords, cotangent)
        for grads in (direct, recomputed_gradients(leaves, keywords, cotangent, rounded_to)):
            ordered = [g[..., o] for g, o in zip(grads, (back, back, back_v), strict=False)] + list(grads[3:])
            results.append((out.detach()[..., back_v], lse.detach(), *ordered))
    return results
