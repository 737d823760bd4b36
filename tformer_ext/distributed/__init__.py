"""Beyond one machine: context parallelism, tensor parallelism, DTensor.

DistributedDataParallel and fully_shard need nothing from here; see docs/train-on-several-machines.md.
"""

import importlib

from .ring import ring_attention
from .sequence import gather_sequence, shard_sequence

# torch.distributed.tensor, which these need, takes long to import
_OF_TENSOR_PARALLEL = ("HeadParallel", "SequenceParallel", "ShardedDropout", "full_state_dict", "tensor_parallel_plan")

__all__ = [*_OF_TENSOR_PARALLEL, "gather_sequence", "ring_attention", "shard_sequence"]


def __getattr__(name):
    if name in _OF_TENSOR_PARALLEL:
        return getattr(importlib.import_module(f"{__name__}.tensor_parallel"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
