"""Fused Transformer kernels for PyTorch: attention and residual normalisation, training and inference."""

import torch as _torch  # noqa: F401  (libtorch must be loaded before the extension that links to it)

try:
    from . import _C
except ModuleNotFoundError as error:
    if error.name != f"{__name__}._C":
        raise
    raise ImportError(
        "tformer_ext is not compiled: run `pip install --no-build-isolation -e .` in the source folder, or leave the "
        "source folder if an installed copy was meant"
    ) from error

from . import functional, memory, modules, reference
from .explain import explain, explain_calls
from .modules import (
    CrossEntropyLoss,
    Dropout,
    KeyValueCache,
    Linear,
    MultiheadAttention,
    ResidualLayerNorm,
    ResidualRMSNorm,
    RotaryEmbedding,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from .replacement import replace_modules, restore_modules

__version__ = _C.build_info()["version"]

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
    "__version__",
    "distributed",
    "explain",
    "explain_calls",
    "functional",
    "huggingface",
    "memory",
    "modules",
    "reference",
    "replace_modules",
    "restore_modules",
]

if hasattr(modules, "LinearCrossEntropyLoss"):  # since torch 2.13
    from .modules import LinearCrossEntropyLoss

    __all__ += ["LinearCrossEntropyLoss"]


def __getattr__(name):
    if name in ("distributed", "huggingface"):  # imports torch.distributed, transformers only when asked for
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
