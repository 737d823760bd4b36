"""Beyond one machine: context parallelism, tensor parallelism, DTensor.

DistributedDataParallel and fully_shard need nothing from here; see docs/train-on-several-machines.md.
"""

from .ring import ring_attention
from .sequence import gather_sequence, shard_sequence

__all__ = ["gather_sequence", "ring_attention", "shard_sequence"]
