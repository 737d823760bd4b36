"""Memory of large results on the CPU.

When a result of 256 KiB or more is freed, its memory is kept for the next one of that size, because having the system
map and clear new pages takes longer than most kernels take to fill them. From 4 MiB on kept memory is marked as free to
take: the system reclaims it before it runs short, although it counts as this process's until then. At first up to an
eighth of the machine's memory is kept, at most 32 MiB of it in blocks below 4 MiB. Results that are kept this way live
in storages of their own, which cannot be resized.
"""

import operator

from . import _C

__all__ = ["kept_bytes", "release", "set_limit"]


def kept_bytes():
    """Bytes kept at the moment for later results."""
    return _C.kept_bytes()


def set_limit(limit):
    """Keeps at most `limit` bytes from now on; what is beyond that is given back at once.

    0 keeps none and takes results from torch's allocator. Returns the limit that was in force before.
    Raises TypeError for what is no integer, ValueError for a negative number.
    """
    try:
        limit = operator.index(limit)
    except TypeError:
        raise TypeError(f"limit: expected a number of bytes, got {type(limit).__name__}") from None
    if limit < 0:
        raise ValueError(f"limit: expected 0 or more bytes, got {limit}")
    return _C.set_kept_bytes(limit)


def release():
    """Gives all kept memory back to the system; the limit stays."""
    set_limit(set_limit(0))
