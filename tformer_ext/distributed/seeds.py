"""Dropout on several ranks: each shard or block draws for itself, from a seed of its own."""

import torch

# The golden ratio in 64 bits as a signed number: seeds this far apart are none that a user counts up.
_STEP = 0x9E3779B97F4A7C15 - 2**64


def numbered_seed(seed, number):
    """The seed (int64 tensor) of shard or block `number`; that of number 0 is the seed itself. int64 wraps around."""
    return seed + torch.tensor(number, dtype=torch.int64, device=seed.device) * _STEP
