"""Every op in plain PyTorch: the specification. Differentiable any number of times, any dtype, any device.

Written to be read and compared with, not to be fast: scores are held as a whole (Sq x Sk) matrix here.
"""

from .attention import attention, attention_dropout_mask, attention_rows, attention_varlen, visible_keys
from .cross_entropy import cross_entropy
from .philox import philox
from .residual_norm import norm_dropout_mask, residual_layer_norm, residual_rms_norm

__all__ = [
    "attention",
    "attention_dropout_mask",
    "attention_rows",
    "attention_varlen",
    "cross_entropy",
    "norm_dropout_mask",
    "philox",
    "residual_layer_norm",
    "residual_rms_norm",
    "visible_keys",
]
