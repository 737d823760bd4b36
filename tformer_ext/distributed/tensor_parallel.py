"""Tensor parallelism: styles for torch.distributed.tensor.parallel.parallelize_module, and a plan made of them."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel import SequenceParallel as _SequenceParallel

from ..modules import Dropout, MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer
from ..modules.linear import linear
from .seeds import numbered_seed

_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class HeadParallel(ParallelStyle):
    """Gives each rank some heads of a tformer_ext.MultiheadAttention, with their part of all projections.

    Inputs are the same on every rank, or DTensors, which are made so; so is the output, a plain tensor. The number of
    ranks must divide the heads, and the heads of keys and values. In the module the packed in_proj_weight becomes
    q_proj_weight, k_proj_weight and v_proj_weight, DTensors sharded along their rows, and out_proj.weight is sharded
    along its columns; full_state_dict puts together what one process has. With dropout every rank draws for its heads
    from a seed of its own, made of one that must be the same on all ranks: seed their default generators alike.
    """

    def _apply(self, module, device_mesh):
        if type(module) is not MultiheadAttention:
            raise TypeError(
                f"HeadParallel: expected a tformer_ext.MultiheadAttention (see tformer_ext.replace_modules), got "
                f"{type(module).__name__}"
            )
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh: expected one dimension, got {device_mesh}")
        ranks = device_mesh.size()
        for name, heads in (("num_heads", module.num_heads), ("num_kv_heads", module.num_kv_heads or ranks)):
            if heads % ranks:
                raise ValueError(f"{name}: expected a multiple of the {ranks} ranks, got {heads}")
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("add_bias_kv, add_zero_attn: expected False under tensor parallelism")
        packed = module._qkv_same_embed_dim
        if packed:
            weights = module.in_proj_weight.detach().split(module._widths())
        else:
            weights = [getattr(module, name).detach() for name in _PROJECTIONS]
        trained = (module.in_proj_weight if packed else module.q_proj_weight).requires_grad
        for name, weight in zip(_PROJECTIONS, weights, strict=True):
            sharded = distribute_tensor(weight.contiguous(), device_mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=trained))
        module.in_proj_weight = None
        if module.in_proj_bias is not None:
            bias = distribute_tensor(module.in_proj_bias.detach(), device_mesh, [Replicate()])
            module.in_proj_bias = nn.Parameter(bias, requires_grad=module.in_proj_bias.requires_grad)
        parallelize_module(module.out_proj, device_mesh, RowwiseParallel())
        module._qkv_same_embed_dim = False
        module.packed, module.mesh = packed, device_mesh
        module.__class__ = HeadParallelAttention
        return module


class HeadParallelAttention(MultiheadAttention):
    """What HeadParallel makes of a MultiheadAttention: projections and heads of this rank, attention on a DTensor."""

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
        *,
        cache=None,
    ):
        """See MultiheadAttention.forward. need_weights must be False, cache None."""
        if need_weights:
            raise ValueError("need_weights: expected False under tensor parallelism, where no rank has all heads")
        if cache is not None:
            raise ValueError("cache: expected None under tensor parallelism")
        return super().forward(
            query, key, value, key_padding_mask, False, attn_mask, average_attn_weights, is_causal=is_causal
        )

    def _heads(self, query, key, value, batched, batch_first, cache):
        """(N, H, L, D), (N, Hk, S, D) twice as DTensors of which this rank has its heads."""
        entered = {id(t): self._enter(t) for t in (query, key, value)}  # self-attention enters once
        biases = (None,) * 3
        if self.in_proj_bias is not None:
            parts = self.in_proj_bias.split(self._widths())
            biases = [t.redistribute(placements=[Shard(0)]).to_local() for t in parts]
        heads = []
        for t, name, bias in zip((query, key, value), _PROJECTIONS, biases, strict=True):
            projected = linear(entered[id(t)], getattr(self, name).to_local(), bias)
            projected = projected.unflatten(-1, (-1, self.head_dim))
            projected = projected if batched else projected.unsqueeze(0)
            heads.append(projected.transpose(1, 2) if batch_first else projected.permute(1, 2, 0, 3))
        if self.rotary is not None:
            heads[:2] = (self.rotary(t) for t in heads[:2])
        return tuple(DTensor.from_local(t, self.mesh, [Shard(1)], run_check=False) for t in heads)

    def _enter(self, t):
        """The whole t as a plain tensor whose gradients of all ranks are added up."""
        if isinstance(t, DTensor):
            t = t.redistribute(self.mesh, [Replicate()])
        else:
            t = DTensor.from_local(t, self.mesh, [Replicate()], run_check=False)
        return t.to_local(grad_placements=[Partial()])


class SequenceParallel(_SequenceParallel):
    """torch's SequenceParallel for norms that take a residual as well: all positional inputs are sharded, not only the
    first. torch's own drops the others: a residual that is not a keyword would be left out in silence.

    For ResidualLayerNorm, ResidualRMSNorm, torch.nn.LayerNorm, torch.nn.RMSNorm. Plain inputs are this rank's part of
    the sequence (dimension sequence_dim), outputs DTensors unless use_local_output.
    """

    def _apply(self, module, device_mesh):
        for name, parameter in list(module.named_parameters(recurse=False)):
            replicated = DTensor.from_local(parameter.detach(), device_mesh, [Replicate()], run_check=False)
            module.register_parameter(name, nn.Parameter(replicated, requires_grad=parameter.requires_grad))

        def shard(t):
            return self._prepare_input_fn(self.sequence_sharding, module, (t,), device_mesh)

        def before(_module, inputs, keywords):
            keywords = {name: shard(t) if isinstance(t, torch.Tensor) else t for name, t in keywords.items()}
            return tuple(shard(t) if isinstance(t, torch.Tensor) else t for t in inputs), keywords

        def after(_module, _inputs, outputs):
            if not self.use_local_output:
                return outputs
            return tuple(t.to_local() for t in outputs) if isinstance(outputs, tuple) else outputs.to_local()

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
        return module


class ShardedDropout(ParallelStyle):
    """For a torch.nn.Dropout of features of which each rank has some: every rank draws its own mask.

    torch's would draw the same one on all ranks, since their generators have to agree for everything that is not
    sharded. One number is drawn from the default generator, so that they still agree afterwards.
    """

    def _apply(self, module, device_mesh):
        if type(module) not in (nn.Dropout, Dropout):
            raise TypeError(f"ShardedDropout: expected a torch.nn.Dropout, got {type(module).__name__}")
        module.number, module.__class__ = device_mesh.get_local_rank(), _ShardedDropout
        return module


class _ShardedDropout(nn.Dropout):
    def forward(self, x):
        if not self.training or self.p == 0.0:
            return x
        seed = numbered_seed(torch.randint(0, 2**62, (), dtype=torch.int64), self.number)
        generator = torch.Generator(x.device).manual_seed(int(seed))
        kept = torch.empty_like(x).bernoulli_(1.0 - self.p, generator=generator)
        return x * kept.div_(1.0 - self.p) if self.p < 1.0 else x * kept


def tensor_parallel_plan(model):
    """The plan for parallelize_module(model, mesh, plan) of all Transformer layers and attentions in a model.

    Attentions get HeadParallel; of encoder and decoder layers linear1 is cut into columns, linear2 into rows, and what
    is dropped between them drawn on each rank. Everything else (norms, embeddings) stays as it is, the same on every
    rank; add styles for it as you like. Inputs and outputs are plain tensors, the same on every rank.

    Args:
        model: holds tformer_ext's MultiheadAttention, TransformerEncoderLayer or TransformerDecoderLayer somewhere.

    Returns:
        {name of the submodule: style}

    Raises:
        ValueError: where there is nothing to cut, or torch.nn's own layers, which cannot be cut by heads.
    """
    plan = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if type(module) is MultiheadAttention:
            plan[name] = HeadParallel()
        elif isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"model: expected tformer_ext.MultiheadAttention, got {type(module).__name__} at {name!r}; "
                "see tformer_ext.replace_modules"
            )
        elif isinstance(module, (TransformerEncoderLayer, TransformerDecoderLayer)):
            plan[f"{prefix}linear1"] = ColwiseParallel()
            plan[f"{prefix}dropout"] = ShardedDropout()
            plan[f"{prefix}linear2"] = RowwiseParallel()
    if not plan or "" in plan:
        raise ValueError(
            "model: expected one that holds attentions or Transformer layers, got "
            f"{type(model).__name__}; give HeadParallel() to parallelize_module for a single attention"
        )
    return plan


def full_state_dict(model):
    """The state_dict that one process has of a model that was cut by HeadParallel, torch's styles or fully_shard.

    DTensors are gathered: every rank of their meshes has to call. Names are those of before: in_proj_weight is packed.
    """
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, HeadParallelAttention) and module.packed:
            prefix = f"{name}." if name else ""
            state[f"{prefix}in_proj_weight"] = torch.cat([state.pop(prefix + p) for p in _PROJECTIONS])
    return state
