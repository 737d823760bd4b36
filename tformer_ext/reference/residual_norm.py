"""norm(residual + dropout(x)) in plain PyTorch."""

import torch

from .philox import MASK, keep_scale, random_numbers, threshold


def norm_dropout_mask(seed, M, N, p, *, device=None):
    """True = kept, bool (M, N): a pure function of (seed, row, column)."""
    row = torch.arange(M, device=device).view(M, 1)
    column = torch.arange(N, device=device).view(1, N)
    stream = 0x4E4F524D  # "NORM": apart from attention's counters
    return random_numbers(column, row & MASK, row >> 32, stream, seed) >= threshold(p)


def residual_layer_norm(x, residual=None, weight=None, bias=None, **options):
    """The specification of tformer_ext.functional.residual_layer_norm."""
    return _residual_norm(x, residual, weight, bias, rms=False, **options)


def residual_rms_norm(x, residual=None, weight=None, bias=None, **options):
    """The specification of tformer_ext.functional.residual_rms_norm."""
    return _residual_norm(x, residual, weight, bias, rms=True, **options)


def _residual_norm(
    x,
    residual,
    weight,
    bias,
    *,
    rms,
    eps=1e-5,
    dropout_p=0.0,
    dropout_seed=None,
    return_residual=False,
    residual_dtype=None,
):
    dims = weight.dim() if weight is not None else bias.dim() if bias is not None else 1
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.to(accumulate)
    if dropout_p > 0:
        N = x.shape[-dims:].numel()
        kept = norm_dropout_mask(dropout_seed, x.numel() // N if N else 0, N, dropout_p, device=x.device).view(x.shape)
        h = h * (kept.to(accumulate) * keep_scale(dropout_p))
    if residual is not None:
        h = h + residual.to(accumulate)
    sum_dtype = residual_dtype or (x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    h = h.to(sum_dtype)  # what is returned, and saved for backward, is what is normalised
    y = normalize(h.to(accumulate), weight, bias, eps, rms, dims).to(x.dtype)
    return (y, h) if return_residual else y


def normalize(h, weight, bias, eps, rms, dims=1):
    """(h - mean) / sqrt(var + eps) * weight + bias over the last `dims` dimensions, in h's dtype; RMS: no mean."""
    over = tuple(range(-dims, 0))
    centered = h if rms else h - h.mean(over, keepdim=True)
    xhat = centered * torch.rsqrt((centered * centered).mean(over, keepdim=True) + eps)
    if weight is not None:
        xhat = xhat * weight.to(h.dtype)
    return xhat if bias is None else xhat + bias.to(h.dtype)
