"""norm(residual + dropout(x)) as modules, and joined from the modules of a Transformer layer."""

import torch
from torch import nn

from .. import functional as F
from .dropout import is_plain_dropout
from .plain import is_plain


class _Residual:
    """What ResidualLayerNorm and ResidualRMSNorm add to torch's norms."""

    def _set_options(self, dropout, return_residual, residual_dtype):
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout}")
        self.dropout = dropout
        self.return_residual = return_residual
        self.residual_dtype = residual_dtype

    def _check(self, x):
        if tuple(x.shape[x.dim() - len(self.normalized_shape) :]) != tuple(self.normalized_shape):
            raise RuntimeError(
                f"Given normalized_shape={list(self.normalized_shape)}, expected input with shape "
                f"[*, {', '.join(map(str, self.normalized_shape))}], but got input of size{list(x.shape)}"
            )

    def _run(self, function, x, residual, bias, eps):
        self._check(x)
        options = {
            "eps": eps,
            "dropout_p": self.dropout if self.training else 0.0,
            "return_residual": self.return_residual,
            "residual_dtype": self.residual_dtype,
        }
        if self.weight is None and len(self.normalized_shape) > 1:  # only a weight says how many dimensions to take
            shape = x.shape
            flat = [None if t is None else t.flatten(-len(self.normalized_shape)) for t in (x, residual)]
            out = function(*flat, None, None, **options)
            return tuple(t.view(shape) for t in out) if self.return_residual else out.view(shape)
        return function(x, residual, self.weight, bias, **options)

    def extra_repr(self):
        text = super().extra_repr()
        if self.dropout:
            text += f", dropout={self.dropout}"
        if self.return_residual:
            text += ", return_residual=True"
        return text if self.residual_dtype is None else f"{text}, residual_dtype={self.residual_dtype}"


class ResidualLayerNorm(_Residual, nn.LayerNorm):
    """LayerNorm(residual + dropout(x)); a torch.nn.LayerNorm where it is given no residual.

    Constructor, parameters and state_dict are torch.nn.LayerNorm's. Beyond it:

    Args:
        dropout: probability of dropping elements of x, in training.
        return_residual: forward returns (y, residual + dropout(x)), as a pre-norm block needs.
        residual_dtype: dtype of that sum, x's or float32; None = that of x and residual promoted.

    forward(x, residual=None): x and residual (..., *normalized_shape).
    """

    def __init__(
        self,
        normalized_shape,
        eps=1e-5,
        elementwise_affine=True,
        bias=True,
        device=None,
        dtype=None,
        *,
        dropout=0.0,
        return_residual=False,
        residual_dtype=None,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._set_options(dropout, return_residual, residual_dtype)

    def forward(self, x, residual=None):
        return self._run(F.residual_layer_norm, x, residual, self.bias, self.eps)


class ResidualRMSNorm(_Residual, nn.RMSNorm):
    """RMSNorm(residual + dropout(x)); a torch.nn.RMSNorm where it is given no residual. See ResidualLayerNorm."""

    def __init__(
        self,
        normalized_shape,
        eps=None,
        elementwise_affine=True,
        device=None,
        dtype=None,
        *,
        dropout=0.0,
        return_residual=False,
        residual_dtype=None,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self._set_options(dropout, return_residual, residual_dtype)

    def forward(self, x, residual=None):
        return self._run(F.residual_rms_norm, x, residual, None, rms_eps(self.eps, x.dtype))


def add_norm(x, dropout, residual, norm, keep=False):
    """norm(residual + dropout(x)); with keep also the sum.

    One operation where norm is torch's LayerNorm or RMSNorm of the last dimension and dropout torch's Dropout (or ours
    in their place); any other module is called, so that hooks and replacements take effect. dropout and residual may
    be None.
    """
    dropout_p = 0.0
    if dropout is not None:
        if is_plain_dropout(dropout):
            dropout_p = dropout.p if dropout.training else 0.0
        else:
            x = dropout(x)
    if not _norms_last_dimension(norm):
        x = nn.functional.dropout(x, dropout_p) if dropout_p else x
        x = x if residual is None else residual + x
        return (norm(x), x) if keep else norm(x)
    if residual is not None and residual.dtype != x.dtype:  # autocast: torch adds in the wider type
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wide), residual.to(wide)
    if isinstance(norm, nn.LayerNorm):
        function, bias, eps = F.residual_layer_norm, norm.bias, norm.eps
    else:
        function, bias, eps = F.residual_rms_norm, None, rms_eps(norm.eps, x.dtype)
    return function(x, residual, norm.weight, bias, eps=eps, dropout_p=dropout_p, return_residual=keep)


def _norms_last_dimension(norm):
    """Whether norm is a LayerNorm or RMSNorm, torch's or ours without options, that normalises one dimension."""
    kind = type(norm)
    if kind in (ResidualLayerNorm, ResidualRMSNorm):
        if norm.dropout or norm.return_residual or norm.residual_dtype is not None:
            return False
    elif kind not in (nn.LayerNorm, nn.RMSNorm):
        return False
    return is_plain(norm, kind) and len(norm.normalized_shape) == 1


def rms_eps(eps, dtype):
    """torch.nn.RMSNorm's default: the machine epsilon of the type the norm is computed in."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps if eps is None else eps
