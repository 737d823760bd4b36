"""Drop-ins for torch.nn's modules: same constructors, parameters and results."""

from torch import nn as _nn

from .cache import KeyValueCache
from .cross_entropy import CrossEntropyLoss
from .dropout import Dropout
from .linear import Linear
from .multihead_attention import MultiheadAttention
from .positions import RotaryEmbedding
from .residual_norm import ResidualLayerNorm, ResidualRMSNorm
from .transformer import Transformer, TransformerDecoder, TransformerEncoder
from .transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "CrossEntropyLoss",
    "Dropout",
    "KeyValueCache",
    "Linear",
    "MultiheadAttention",
    "ResidualLayerNorm",
    "ResidualRMSNorm",
    "RotaryEmbedding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

if hasattr(_nn, "LinearCrossEntropyLoss"):  # since torch 2.13
    from .cross_entropy import LinearCrossEntropyLoss

    __all__ += ["LinearCrossEntropyLoss"]
