"""Drop-ins for torch.nn's modules: same constructors, parameters and results."""

from .multihead_attention import MultiheadAttention
from .residual_norm import ResidualLayerNorm, ResidualRMSNorm

__all__ = ["MultiheadAttention", "ResidualLayerNorm", "ResidualRMSNorm"]
