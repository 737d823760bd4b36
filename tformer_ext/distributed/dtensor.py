"""DTensor: how the operators are cut over the ranks of a device mesh, and which weights each rank drops.

Attention is cut along the batch or the heads (query and key heads together), a norm along any dimension but the last.
Nothing else is gathered behind the user's back: a tensor that is cut along another dimension is an error.

This file is imported by the first call with a DTensor, because torch.distributed.tensor takes long to import.
"""

from types import SimpleNamespace

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
        query, key, value = (_placed(t, mesh, placements) for t in (query, key, value))
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
        x, residual = (None if t is None else _placed(t, mesh, placements) for t in (x, residual))
        seed = _seeds(seed, mesh, placements)
    return x, residual, weight, bias, seed


def _placed(t, mesh, placements):
    """Redistributed, but only where it is not so already: torch 2.11 does not differentiate that twice."""
    return t if t.placements == tuple(placements) else t.redistribute(mesh, placements)


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
# Each rule gives, for a cut along one dimension and the operator's arguments t, the placements of all outputs, and of
# those inputs that are not simply cut along that dimension, by their names in csrc/schema.cpp.


def _shard_if(condition, dim):
    return Shard(dim) if condition else Replicate()


def _seed_placement(seed):
    return _shard_if(seed is not None and seed.shape.numel() > 1, 0)


def _attention_inputs(cut, t):
    """Dimensions of size 1 are broadcast; what is per head or per batch has fewer dimensions."""
    heads = _shard_if(cut == 1, 0)
    return {
        "bias": _shard_if(t.bias is not None and t.bias.shape[cut] > 1, cut),
        "mask": _shard_if(t.mask is not None and t.mask.shape[cut] > 1, cut),
        "alibi_slopes": heads if t.alibi_slopes is None or t.alibi_slopes.ndim == 1 else Shard(cut),
        "sinks": heads,
        "key_lengths": _shard_if(cut == 0, 0),
        "cu_seqlens_q": Replicate(),
        "cu_seqlens_k": Replicate(),
        "dropout_seed": _seed_placement(t.dropout_seed),
    }


def _attention_forward(cut, t):
    return [Shard(cut)] * 2, _attention_inputs(cut, t)


def _attention_inference(cut, t):
    return [Shard(cut)], {}


def _attention_backward(cut, t):
    inputs = _attention_inputs(cut, t)
    grad_bias = grad_sinks = Replicate()  # of those not wanted, which are empty
    if t.bias_needs_grad:
        grad_bias = inputs["bias"] if inputs["bias"].is_shard() else Partial()
    if t.sinks is not None:
        grad_sinks = Shard(0) if cut == 1 else Partial()
    return [*[Shard(cut)] * 3, grad_bias, grad_sinks], inputs


def _norm_inputs(t):
    return {"weight": Replicate(), "bias": Replicate(), "dropout_seed": _seed_placement(t.dropout_seed)}


def _norm_forward(cut, t):
    return [Shard(cut), _shard_if(t.save_sum, cut), _shard_if(not t.rms, cut), Shard(cut)], _norm_inputs(t)


def _norm_inference(cut, t):
    return [Shard(cut)], {"weight": Replicate(), "bias": Replicate()}


def _norm_backward(cut, t):
    from ..ops.residual_norm import gradients_apart

    grad_residual = _shard_if(gradients_apart(t.dropout_p, t.x_dtype, t.residual_dtype), cut)
    grad_weight = Replicate() if t.weight is None else Partial()
    grad_bias = Replicate() if t.bias_dtype is None else Partial()
    inputs = {**_norm_inputs(t), "mean": _shard_if(not t.rms, cut)}
    return [Shard(cut), grad_residual, grad_weight, grad_bias], inputs


def _register(op, rule, rows, forward):
    """Tells DTensor all ways to run the operator on shards: each dimension of the mesh whole or cut by the rule.

    rows: name of the tensor whose dimensions are cut, query or the rows of a norm. With dropout it stays as it is
    placed, since the seeds were made for that. Forward operators refuse to gather what is cut otherwise; gradients
    DTensor may redistribute.
    """
    op = op.default
    names, outputs = [a.name for a in op._schema.arguments], len(op._schema.returns)
    is_attention = rows == "query"

    def strategy(op_schema):
        schema, mesh = op_schema.args_schema, op_schema.get_mesh_from_args()
        t = SimpleNamespace(**dict.fromkeys(names))
        for name, a in zip(
            names, schema, strict=False
        ):  # fewer where the rest is left to defaults, all of them None or off
            setattr(t, name, a.strategies[0].output_spec if isinstance(a, OpStrategy) else a)
        if forward:
            _check_attention(mesh, t.query, t.key, t.value) if is_attention else _check_norm(mesh, t.x, t.residual)
        tensors = [name for name, a in zip(names, schema, strict=False) if isinstance(a, OpStrategy)]
        actual = getattr(t, rows)
        if not is_attention:
            cuts = range(actual.ndim - 1)
        else:
            cuts = (1,) if getattr(t, "cu_seqlens_q", None) is not None else (0, 1)  # packed sequences have no batch
        options = [[Replicate()] * (outputs + len(tensors))]
        for cut in cuts:
            results, inputs = rule(cut, t)
            options.append(results + [inputs.get(name, Shard(cut)) for name in tensors])
        kept = []
        for s in expand_to_full_mesh_op_strategy(mesh, op_schema, options, input_index=outputs).strategies:
            placements = s.input_specs[tensors.index(rows)].placements
            moved = getattr(t, "dropout_seed", None) is not None and placements != actual.placements
            if not moved and not (is_attention and not _heads_fit(mesh, placements, t.query, t.key)):
                kept.append(s)
        if not kept:
            raise ValueError(f"{rows}: its placements {actual.placements} cannot be kept")
        return OpStrategy(kept)

    # from argument 0 on everything counts in the cache of decisions: which are None, and numbers, change the outputs
    information = RuntimeSchemaInfo(static_argnum=0)
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(op, strategy, information)


_ops = torch.ops.tformer_ext
_register(_ops._attention_forward, _attention_forward, rows="query", forward=True)
_register(_ops._attention_inference, _attention_inference, rows="query", forward=True)
_register(_ops._attention_backward, _attention_backward, rows="query", forward=False)
_register(_ops._residual_norm_forward, _norm_forward, rows="x", forward=True)
_register(_ops._residual_norm_inference, _norm_inference, rows="x", forward=True)
_register(_ops._residual_norm_backward, _norm_backward, rows="sum", forward=False)
