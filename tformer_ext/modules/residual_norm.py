"""norm(residual + dropout(x)) as modules."""

import torch
from torch import nn

from .. import functional as F


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
        # torch's default: the machine epsilon of the type the norm is computed in
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        eps = torch.finfo(wide).eps if self.eps is None else self.eps
        return self._run(F.residual_rms_norm, x, residual, None, eps)
