"""Context parallelism: attention over a sequence that is cut over ranks.

Every rank keeps its queries; keys and values travel around the ring of ranks, and while a rank computes with one part
the next is on its way. Each part gives an output and a log-sum-exp, which are merged. Backward takes the weights from
the log-sum-exp of the whole row, so that each part's gradients are exact by themselves; the gradients of keys and
values travel around with their part and come home after a full turn.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .. import arguments as check
from ..functional import _autocast
from ..ops.attention import _backward, _forward, empty_in_order_of
from .seeds import numbered_seed
from .sequence import all_gather, check_layout, check_same, process_group, segments


class _Ring(NamedTuple):
    """Everything about a call that is no tensor. low, high: keys from i + low to i + high are seen; None unbounded."""

    group: "dist.ProcessGroup"
    rank: int
    world: int
    layout: str
    low: int | None
    high: int | None
    scale: float
    softcap: float
    dropout_p: float


class Block(NamedTuple):
    """A rectangle of local rows and keys, the window that says what of it is seen, and a number of its own."""

    rows: slice
    keys: slice
    window: tuple
    number: int


def ring_attention(
    query,
    key,
    value,
    *,
    group=None,
    layout="contiguous",
    causal=False,
    window=None,
    key_mask=None,
    scale=None,
    softcap=0.0,
    dropout_p=0.0,
    dropout_seed=None,
    return_lse=False,
):
    """functional.attention over a sequence of which each rank holds a part (see shard_sequence).

    Args:
        query: (B, Hq, Sq / ranks, D), key: (B, Hk, Sk / ranks, D), value: (B, Hk, Sk / ranks, Dv): this rank's part,
            of the same shape on every rank; dtypes, strides and grouped heads as in functional.attention.
        group: ProcessGroup, DeviceMesh of one dimension, or None = all ranks. Every rank of it must call.
        layout: "contiguous" or "zigzag": how shard_sequence cut the sequences. With a causal mask zigzag gives each
            rank the same amount of work; contiguous leaves the first ranks idle most of the time.
        causal, window: as in functional.attention, by positions in the whole sequence.
        key_mask: (B, Sk / ranks) bool, True = may be attended to (no padding): this rank's part.
        scale, softcap, dropout_p: as in functional.attention.
        dropout_seed: as there; None draws one on each rank from torch's default generator. Each rank drops weights of
            its queries: every pair of parts draws its own mask from a seed made of this one and the number of the pair.
            The draw is reproducible but depends on layout and number of ranks; on one rank it is that of
            functional.attention. Ranks may have the same seed or different ones.
        return_lse: also return the log-sum-exp of each row, (B, Hq, Sq / ranks).

    Returns:
        This rank's part of what functional.attention gives for the whole sequence, differentiable once. The same bits
        in every run with as many ranks.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, on every rank.

    Sources: Liu, Zaharia, Abbeel 2023 (ring attention); Brandon et al. 2023 (balanced causal layout).
    """
    check_layout(layout)
    group, rank, world = process_group(group)
    query, key, value = _autocast(query, key, value)
    check.check_qkv(query, key, value)
    check.device_is_served(query)
    B, _, Sq, D = query.shape
    Sk = key.shape[2]
    for name, t in (("query", query), ("key", key)):
        if layout == "zigzag" and t.shape[2] % 2:
            raise ValueError(f"{name}: expected an even number of positions on each rank (zigzag), got {t.shape[2]}")
    if key_mask is not None:
        if not isinstance(key_mask, torch.Tensor) or key_mask.dtype != torch.bool:
            got = key_mask.dtype if isinstance(key_mask, torch.Tensor) else type(key_mask).__name__
            raise TypeError(f"key_mask: expected a bool tensor, True = may be attended to, got {got}")
        if tuple(key_mask.shape) != (B, Sk):
            raise ValueError(f"key_mask: expected (B, Sk / ranks) = {(B, Sk)}, got {tuple(key_mask.shape)}")
        check.same_device("key_mask", key_mask, query.device)
    code = check.causal_code(causal)
    left, right = check.window_pair(window)
    dropout_p = check.probability("dropout_p", dropout_p)
    seed = check.seed_tensor(dropout_seed, dropout_p, query.device)
    check_same(
        group,
        {
            "query": query.shape,
            "key": key.shape,
            "value": (*value.shape, check.DTYPES.index(value.dtype)),
            "layout": (layout == "zigzag",),
            "causal": (code,),
            "window": (left, right),
            "key_mask": (key_mask is not None,),
        },
        query.device,
    )
    diagonal = 0 if code == 1 else (Sk - Sq) * world  # of the whole sequence
    if code:
        right = 0
    ring = _Ring(
        group,
        rank,
        world,
        layout,
        None if left < 0 else diagonal - left,
        None if right < 0 else diagonal + right,
        check.scale_value(scale, D),
        check.softcap_value(softcap),
        dropout_p,
    )
    masks = None  # of all ranks, (ranks, B, 1, 1, Sk): they are small against the keys
    if key_mask is not None:
        masks = all_gather(key_mask.to(torch.uint8), group).bool()[:, :, None, None, :]
    out, lse = RingAttention.apply(*(check.unit_stride(t) for t in (query, key, value)), masks, seed, ring)
    return (out, lse) if return_lse else out


def blocks(ring, source, Sq, Sk):
    """What the rank's Sq queries see of the Sk keys of rank `source`: rectangles, in a fixed order."""
    layout = "contiguous" if ring.low is None and ring.high is None else ring.layout  # all is seen: order is no matter
    found = []
    for a, (row, i0, rows) in enumerate(segments(ring.rank, ring.world, Sq, layout)):
        for b, (key, j0, keys) in enumerate(segments(source, ring.world, Sk, layout)):
            part = seen_part(i0, rows, j0, keys, ring.low, ring.high)
            if part is not None:
                i, i_end, j, j_end, window = part
                number = 4 * (ring.rank * ring.world + source) + 2 * a + b
                row_slice, key_slice = slice(row + i - i0, row + i_end - i0), slice(key + j - j0, key + j_end - j0)
                found.append(Block(row_slice, key_slice, window, number))
    return found


def seen_part(i0, rows, j0, keys, low, high):
    """The rows and keys of a rectangle that the band i + low <= j <= i + high touches.

    Returns (first row, end, first key, end, window) by position in the whole sequence, or None if it is not touched.
    The operator counts its window from the diagonal that ends in the lower right corner; it is unbounded on a side
    where all of the part is seen.
    """
    i_end = i0 + rows if low is None else min(i0 + rows, j0 + keys - low)
    i = i0 if high is None else max(i0, j0 - high)
    if i >= i_end or keys == 0:
        return None
    j = j0 if low is None else max(j0, i + low)
    j_end = j0 + keys if high is None else min(j0 + keys, i_end + high)
    left = -1 if low is None or i_end - 1 + low <= j else j_end - i_end - low
    right = -1 if high is None or i + high >= j_end - 1 else i_end - j_end + high
    return i, i_end, j, j_end, (left, right)


class RingAttention(torch.autograd.Function):
    """out and lse of the rank's queries; masks (ranks, B, 1, 1, Sk) bool or None, seed int64 or None."""

    @staticmethod
    def forward(query, key, value, masks, seed, ring):
        B, Hq, Sq, _ = query.shape
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        result = empty_in_order_of(query, (B, Hq, Sq, value.shape[3]))
        out = torch.zeros_like(result, dtype=wide)
        lse = torch.full((B, Hq, Sq), -torch.inf, dtype=wide, device=query.device)
        for source, buffer in _rotate(ring, _packed(key, value)):
            k, v = _unpacked(buffer, key, value)
            for block in blocks(ring, source, Sq, key.shape[2]):
                rows, keys = block.rows, block.keys
                operands = _operands(ring, block, masks, seed, source)
                part = _forward(query[:, :, rows], k[:, :, keys], v[:, :, keys], *operands)
                _merge(out[:, :, rows], lse[:, :, rows], *part)
        return result.copy_(out), lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.ring = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        query, key, value, masks, seed, out, lse = ctx.saved_tensors
        ring = ctx.ring
        # every rank takes part in the ring, whatever it needs for itself
        grad_out = torch.zeros_like(out) if grad_out is None else check.unit_stride(grad_out.to(out.dtype))
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        travelling, works = None, []
        for source, buffer in _rotate(ring, _packed(key, value)):
            k, v = _unpacked(buffer, key, value)
            grads = torch.zeros_like(buffer, dtype=lse.dtype)
            grad_key, grad_value = _unpacked(grads, key, value)
            for block in blocks(ring, source, query.shape[2], key.shape[2]):
                rows, keys = block.rows, block.keys
                *operands, left, right, scale, softcap, dropout_p = _operands(ring, block, masks, seed, source)
                dq, dk, dv, _, _ = _backward(
                    grad_out[:, :, rows], None if grad_lse is None else grad_lse[:, :, rows].contiguous(),
                    query[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows].contiguous(),
                    *operands[:-1], False, operands[-1], left, right, scale, softcap, dropout_p,
                )  # fmt: skip
                for total, part in (
                    (grad_query[:, :, rows], dq),
                    (grad_key[:, :, keys], dk),
                    (grad_value[:, :, keys], dv),
                ):
                    total += part
            for work in works:
                work.wait()
            if travelling is not None:
                grads += travelling  # of the ranks before, in the order of the ring
            travelling, works = _pass_on(ring, grads, tag=1)
        for work in works:
            work.wait()
        grad_key, grad_value = _unpacked(travelling, key, value)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _operands(ring, block, masks, seed, source):
    """What follows query, key and value in the schema of the operator."""
    mask = None if masks is None else masks[source][..., block.keys]
    seed = None if seed is None else numbered_seed(seed, block.number)
    return None, mask, *[None] * 5, seed, 0, *block.window, ring.scale, ring.softcap, ring.dropout_p


def _merge(out, lse, part_out, part_lse):
    """Adds a part, normalised by its own log-sum-exp, to what the other parts gave, in place."""
    total = torch.logaddexp(lse, part_lse)
    finite = torch.where(total == -torch.inf, 0, total)  # rows that saw nothing yet have weight exp(-inf) = 0
    out.mul_(torch.exp(lse - finite).unsqueeze(-1)).add_(part_out * torch.exp(part_lse - finite).unsqueeze(-1))
    lse.copy_(total)


def _packed(key, value):
    """Both in one message."""
    return torch.cat([key.reshape(-1), value.reshape(-1)])


def _unpacked(buffer, key, value):
    return buffer[: key.numel()].view(key.shape), buffer[key.numel() :].view(value.shape)


def _rotate(ring, buffer):
    """(source rank, its buffer) of all ranks, the own one first; the next one travels while the caller works."""
    for step in range(ring.world):
        last = step == ring.world - 1
        coming, works = (None, []) if last else _pass_on(ring, buffer, tag=0)
        yield (ring.rank - step) % ring.world, buffer
        for work in works:
            work.wait()
        buffer = coming


def _pass_on(ring, buffer, tag):
    """Sends the buffer to the next rank; returns the one that comes from the rank before and what to wait for."""
    if ring.world == 1 or buffer.numel() == 0:
        return buffer, []
    coming = torch.empty_like(buffer)
    to, source = (dist.get_global_rank(ring.group, (ring.rank + step) % ring.world) for step in (1, -1))
    return coming, dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, buffer, to, ring.group, tag),
            dist.P2POp(dist.irecv, coming, source, ring.group, tag),
        ]
    )
