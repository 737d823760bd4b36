"""Context parallelism: which positions of a sequence a rank holds, and how they get there and back."""

import torch
import torch.distributed as dist

LAYOUTS = ("contiguous", "zigzag")


def process_group(group):
    """(ProcessGroup, rank in it, its size) of a ProcessGroup, a DeviceMesh of one dimension, or None = all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: expected an initialised process group; call torch.distributed.init_process_group() first, "
            "in a script started by torchrun"
        )
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group: expected a DeviceMesh of one dimension, got {group}")
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected a group that this rank belongs to")
    return group, rank, dist.get_world_size(group)


def check_layout(layout):
    if layout not in LAYOUTS:
        raise ValueError(f'layout: expected "contiguous" or "zigzag", got {layout!r}')


def segments(rank, world, length, layout):
    """What a rank holds: [(first local position, first position in the whole sequence, how many), ...].

    contiguous: the rank-th of `world` parts. zigzag: of 2 * world parts the rank-th from the front and the rank-th from
    the back, so that under a causal mask all ranks have as much to do. length is that of the rank's own part.
    """
    if layout == "contiguous":
        return [(0, rank * length, length)]
    half = length // 2
    return [(0, rank * half, half), (half, (2 * world - 1 - rank) * half, half)]


def _dimension(tensor, dim, name="tensor"):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"dim: expected a dimension of {name}, which has {tensor.dim()}, got {dim}")
    return dim % tensor.dim()


def shard_sequence(tensor, dim=1, *, group=None, layout="contiguous"):
    """This rank's part of a sequence that every rank holds whole.

    Args:
        tensor: the whole sequence, the same on every rank: tokens (B, S), states (B, S, E), heads (B, H, S, D) ...
        dim: the dimension that is the sequence, of a length that the number of ranks divides (twice that for zigzag).
        group: ProcessGroup, DeviceMesh of one dimension, or None = all ranks.
        layout: "contiguous": rank r holds the r-th part; "zigzag": the r-th of twice as many parts, and the r-th from
            the back: with a causal mask all ranks then have the same amount of work.

    Returns:
        A contiguous tensor with dim shorter by the number of ranks. Its gradient is that of this rank's part.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_layout(layout)
    _, rank, world = process_group(group)
    dim = _dimension(tensor, dim)
    parts = world if layout == "contiguous" else 2 * world
    length = tensor.shape[dim]
    if length % parts:
        raise ValueError(
            f"tensor: expected a length along dim {dim} that {parts} divides ({layout}, {world} ranks), got {length}"
        )
    own = [tensor.narrow(dim, start, size) for _, start, size in segments(rank, world, length // world, layout)]
    return own[0].contiguous() if len(own) == 1 else torch.cat(own, dim)


def gather_sequence(tensor, dim=1, *, group=None, layout="contiguous"):
    """The whole sequence on every rank, from the parts that shard_sequence made: its inverse.

    Args:
        tensor: this rank's part, of the same shape on every rank. dim, group, layout: as in shard_sequence.

    Returns:
        The tensor with dim longer by the number of ranks. Differentiable: what is minimised is the sum of what the
        ranks compute, so the gradient of a part is the sum of its gradients on all ranks.
    """
    check_layout(layout)
    group, rank, world = process_group(group)
    dim = _dimension(tensor, dim)
    if layout == "zigzag" and tensor.shape[dim] % 2:
        raise ValueError(f"tensor: expected an even length along dim {dim} (zigzag), got {tensor.shape[dim]}")
    check_same(group, {"tensor": (*tensor.shape, *[0] * (8 - tensor.dim()))}, tensor.device)
    return _Gather.apply(tensor, dim, group, rank, world, layout)


def all_gather(tensor, group):
    """(ranks, *tensor.shape)"""
    every = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    dist.all_gather(list(every), tensor.contiguous(), group=group)
    return every


def check_same(group, named, device):
    """Raises on every rank where a rank's integers under one of the names differ from those of the first rank."""
    own = torch.tensor([n for numbers in named.values() for n in numbers], dtype=torch.int64, device=device)
    every = all_gather(own, group)
    if bool((every == every[0]).all()):
        return
    first = 0
    for name, numbers in named.items():
        columns = every[:, first : first + len(numbers)].tolist()
        first += len(numbers)
        for other, column in enumerate(columns):
            if column != columns[0]:
                raise ValueError(
                    f"{name}: expected the same shape and options on every rank, got {columns[0]} on rank 0 and "
                    f"{column} on rank {other}"
                )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, group, rank, world, layout):
        ctx.arguments = dim, group, rank, world, layout
        every = all_gather(tensor, group)
        whole = tensor.new_empty([n * world if d == dim else n for d, n in enumerate(tensor.shape)])
        for r in range(world):
            for local, start, size in segments(r, world, tensor.shape[dim], layout):
                whole.narrow(dim, start, size).copy_(every[r].narrow(dim, local, size))
        return whole

    @staticmethod
    def backward(ctx, grad):
        dim, group, rank, world, layout = ctx.arguments
        grad = grad.contiguous(memory_format=torch.contiguous_format).clone()
        dist.all_reduce(grad, group=group)
        own = [grad.narrow(dim, start, n) for _, start, n in segments(rank, world, grad.shape[dim] // world, layout)]
        return torch.cat(own, dim), *[None] * 5
