"""DTensor: how the operators are cut over the ranks of a device mesh, and which weights each rank drops.

Attention is cut along the batch or the heads (query and key heads together), a norm along any dimension but the last.
Nothing else is gathered behind the user's back: a tensor that is cut along another dimension is an error.

This file is imported by the first call with a DTensor, because torch.distributed.tensor takes long to import.
"""

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

from .seeds import numbered_seed

# ---- operands of the Python functions -------------------------------------------------------------------------------


def place_attention(operands):
    """The operands of ops.attention (the query is a DTensor) as the strategies below take them."""
    query, key, value, *others = operands[:11]
    mesh, seed = query.device_mesh, others.pop()
    for name, t in (("key", key), ("value", value)):
        if not isinstance(t, DTensor):
            raise TypeError(f"{name}: expected a DTensor as query is, got {type(t).__name__}")
    placements = _check_attention(mesh, query, key, value)
    others = [_as_dtensor(t, mesh) for t in others]
    if seed is not None:
        query, key, value = (t.redistribute(mesh, placements) for t in (query, key, value))
        seed = _seeds(seed, mesh, placements)
    return query, key, value, *others, seed, *operands[11:]


def place_norm(x, residual, weight, bias, seed):
    """The tensors of ops.residual_norm (x or residual is a DTensor) as the strategies below take them."""
    if not isinstance(x, DTensor):
        raise TypeError(f"x: expected a DTensor as residual is, got {type(x).__name__}")
    mesh = x.device_mesh
    residual, weight, bias = (_as_dtensor(t, mesh) for t in (residual, weight, bias))
    placements = _check_norm(mesh, x, residual)
    if seed is not None:
        x, residual = (None if t is None else t.redistribute(mesh, placements) for t in (x, residual))
        seed = _seeds(seed, mesh, placements)
    return x, residual, weight, bias, seed


def _as_dtensor(t, mesh):
    """A plain tensor is the same on every rank."""
    if t is None or isinstance(t, DTensor):
        return t
    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _check_placements(name, placements, dims):
    if not all(p.is_replicate() or p.is_partial() or (type(p) is Shard and p.dim in dims) for p in placements):
        raise ValueError(f"{name}: expected a DTensor sharded along dimensions {tuple(dims)} only, got {placements}")


def _check_attention(mesh, query, key, value):
    """Raises unless query, key and value (DTensors or their specs) can be cut as they are; returns how."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        _check_placements(name, t.placements, (0, 1))
    placements = _common_placements(mesh, (query, key, value))
    if not _heads_fit(mesh, placements, query, key):
        raise ValueError(
            f"key: expected a number of heads that {_shards(mesh, placements, 1)} ranks share evenly, so that grouped "
            f"query heads stay with their key head, got {key.shape[1]}"
        )
    return placements


def _check_norm(mesh, x, residual):
    """The same for the rows of a norm."""
    tensors = {"x": x} if residual is None else {"x": x, "residual": residual}
    for name, t in tensors.items():
        _check_placements(name, t.placements, range(t.ndim - 1))
    return _common_placements(mesh, tensors.values())


def _common_placements(mesh, tensors):
    """For each dimension of the mesh the first cut that one of the tensors has."""
    columns = zip(*(t.placements for t in tensors), strict=True)
    return [next((p for p in column if p.is_shard()), Replicate()) for column in columns]


def _shards(mesh, placements, dim=None):
    """Into how many parts the dimension (None: all together) is cut."""
    sizes = [mesh.size(n) for n, p in enumerate(placements) if p.is_shard(dim)]
    return torch.Size(sizes).numel()


def _heads_fit(mesh, placements, query, key):
    """Grouped heads stay together only if each rank gets as many; equal numbers are cut alike anyway."""
    return query.shape[1] == key.shape[1] or key.shape[1] % _shards(mesh, placements, 1) == 0


def _seeds(seed, mesh, placements):
    """One seed for each shard, each on its rank: shards must not drop the same weights, replicas must."""
    if isinstance(seed, DTensor):
        seed = seed.full_tensor()
    coordinate = mesh.get_coordinate()
    cut = [n for n, p in enumerate(placements) if p.is_shard()]
    index = 0
    for n in cut:
        index = index * mesh.size(n) + coordinate[n]
    where = [Shard(0) if n in cut else Replicate() for n in range(mesh.ndim)]
    return DTensor.from_local(numbered_seed(seed, index).view(1), mesh, where, run_check=False)


# ---- sharding strategies of the operators ---------------------------------------------------------------------------
#
# Each rule gives, for a cut along one dimension, the placements of all outputs and of all inputs; what belongs to an
# input that is None or a number is not looked at.


def _shard_if(condition, dim):
    return Shard(dim) if condition else Replicate()


def _seed_placement(seed):
    return _shard_if(seed is not None and seed.shape.numel() > 1, 0)


def _attention_extras(cut, bias, mask, alibi_slopes, sinks, *rest):
    """Placements of what comes after query, key and value; dimensions of size 1 are broadcast."""
    scores = [_shard_if(t is not None and t.shape[cut] > 1, cut) for t in (bias, mask)]
    heads = _shard_if(cut == 1, 0)
    slopes = Shard(cut) if alibi_slopes is not None and alibi_slopes.ndim == 2 else heads
    return [*scores, slopes, heads, _shard_if(cut == 0, 0), Replicate(), Replicate(), _seed_placement(rest[3])]


def _attention_forward(cut, query, key, value, *extras):
    extras = (*extras, *[None] * (8 - len(extras)))
    return [Shard(cut)] * 2, [Shard(cut)] * 3 + _attention_extras(cut, *extras[:8])


def _attention_backward(cut, grad_out, grad_lse, query, key, value, out, lse, bias, mask, alibi_slopes, sinks, *rest):
    bias_needs_grad = rest[4]
    grad_bias = grad_sinks = Replicate()  # of those not wanted, which are empty
    if bias_needs_grad:
        grad_bias = Shard(cut) if bias.shape[cut] > 1 else Partial()
    if sinks is not None:
        grad_sinks = Shard(0) if cut == 1 else Partial()
    extras = _attention_extras(cut, bias, mask, alibi_slopes, sinks, *rest[:4])
    return [*[Shard(cut)] * 3, grad_bias, grad_sinks], [Shard(cut)] * 7 + extras


def _norm_forward(cut, x, residual, weight, bias, seed, eps, dropout_p, rms, save_sum, sum_dtype):
    outputs = [Shard(cut), _shard_if(save_sum, cut), _shard_if(not rms, cut), Shard(cut)]
    return outputs, [Shard(cut), Shard(cut), Replicate(), Replicate(), _seed_placement(seed)]


def _norm_inference(cut, *_):
    return [Shard(cut)], [Shard(cut), Shard(cut), Replicate(), Replicate()]


def _norm_backward(cut, grad_y, grad_sum, total, mean, rstd, weight, seed, dropout_p, rms, x_dtype, *dtypes):
    from ..ops.residual_norm import gradients_apart

    residual_dtype, bias_dtype = dtypes
    outputs = [
        Shard(cut),
        _shard_if(gradients_apart(dropout_p, x_dtype, residual_dtype), cut),
        Replicate() if weight is None else Partial(),
        Replicate() if bias_dtype is None else Partial(),
    ]
    inputs = [*[Shard(cut)] * 3, _shard_if(not rms, cut), Shard(cut), Replicate(), _seed_placement(seed)]
    return outputs, inputs


def _attention_cuts(seed, args):
    return (1,) if args[seed - 2] is not None else (0, 1)  # packed sequences have no batch


def _norm_cuts(_seed, args):
    return range(args[0].ndim - 1)


def _register(op, rule, cuts, first, seed, check=None):
    """Tells DTensor all ways to run the operator on shards: each dimension of the mesh whole or cut by the rule.

    first, seed: positions of the first tensor (query, or the rows of a norm) and of the dropout seed. With a seed the
    first tensor stays as it is placed, since the seeds were made for that. check: of forward operators, which refuse
    to gather what is cut otherwise; gradients DTensor may redistribute.
    """
    op = op.default
    names, outputs = [a.name for a in op._schema.arguments], len(op._schema.returns)

    def strategy(op_schema):
        schema, mesh = op_schema.args_schema, op_schema.get_mesh_from_args()
        args = [a.strategies[0].output_spec if isinstance(a, OpStrategy) else a for a in schema]
        args += [None] * (len(names) - len(args))
        tensors = [n for n, a in enumerate(schema) if isinstance(a, OpStrategy)]
        if check is not None:
            check(mesh, *args[: 3 if check is _check_attention else 2])
        options = [[Replicate()] * (outputs + len(tensors))]
        for cut in cuts(seed, args):
            out, inputs = rule(cut, *args)
            options.append(out + [inputs[n] for n in tensors])
        every = expand_to_full_mesh_op_strategy(mesh, op_schema, options, input_index=outputs).strategies
        at = tensors.index(first)
        if seed is not None and args[seed] is not None:
            every = [s for s in every if s.input_specs[at].placements == args[first].placements]
        if cuts is _attention_cuts:
            query, key = args[first : first + 2]
            every = [s for s in every if _heads_fit(mesh, s.input_specs[at].placements, query, key)]
        if not every:
            raise ValueError(f"{names[first]}: its placements {args[first].placements} cannot be kept")
        return OpStrategy(every)

    # from argument 0 on everything counts in the cache of decisions: which are None, and numbers, change the outputs
    information = RuntimeSchemaInfo(static_argnum=0)
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(op, strategy, information)


_ops = torch.ops.tformer_ext
_register(_ops._attention_forward, _attention_forward, _attention_cuts, first=0, seed=10, check=_check_attention)
_register(_ops._attention_backward, _attention_backward, _attention_cuts, first=2, seed=14)
_register(_ops._residual_norm_forward, _norm_forward, _norm_cuts, first=0, seed=4, check=_check_norm)
_register(_ops._residual_norm_inference, _norm_inference, _norm_cuts, first=0, seed=None, check=_check_norm)
_register(_ops._residual_norm_backward, _norm_backward, _norm_cuts, first=2, seed=6)
