"""Philox 4x32, the counter-based generator behind dropout, in exact int64 arithmetic.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def _multiply(a, multiplier):
    """High and low 32 bits of a * multiplier; a is an int64 tensor below 2**32."""
    # 16-bit halves of a keep every product below 2**48
    low = (a & 0xFFFF) * multiplier
    high = (a >> 16) * multiplier + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter, seed, rounds=ROUNDS):
    """Four random 32-bit words for each counter.

    counter: four int64 tensors (or ints) below 2**32 that broadcast together.
    seed: int or int64 tensor of one element; its low and high halves are the key.
    Returns four int64 tensors below 2**32.
    """
    device = next((c.device for c in counter if isinstance(c, torch.Tensor)), None)
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64, device=device) for c in counter))
    seed = torch.as_tensor(seed, dtype=torch.int64, device=c0.device).reshape(())
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(rounds):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def random_numbers(position, c1, c2, c3, seed):
    """The 16-bit number of each position: blocks of 64 share 8 counters, each word of which serves two positions."""
    counter = (position >> 6 << 3) | ((position & 15) >> 1)
    words = torch.stack(philox((counter, c1, c2, c3), seed))
    which = torch.broadcast_to((position >> 5 & 1) << 1 | position & 1, words.shape[1:])
    return words.gather(0, which.unsqueeze(0)).squeeze(0) >> (position >> 4 & 1) * 16 & 0xFFFF


def threshold(p):
    """An element is dropped where its number is below this: the probability is a multiple of 2**-16."""
    return min(int(p * 2**16 + 0.5), 2**16 - 1)


def keep_scale(p):
    """What a kept element is multiplied by: 1 / (1 - p), p as it is after rounding to a multiple of 2**-16."""
    return 2**16 / (2**16 - threshold(p)) if p < 1.0 else 0.0
