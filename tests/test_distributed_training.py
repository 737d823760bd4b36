"""Training on several ranks takes the steps that one process takes: DDP, fully_shard, tensor parallelism, and mixed."""

import copy
import os

import pytest
import torch
from ranks import Communication, raises
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import tformer_ext as tx
from tformer_ext.distributed import (
    HeadParallel,
    SequenceParallel,
    ShardedDropout,
    full_state_dict,
    gather_sequence,
    ring_attention,
    shard_sequence,
    tensor_parallel_plan,
)
from tformer_ext.distributed.seeds import numbered_seed

VARIANTS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True, "activation": "gelu"},
    "grouped heads, RMSNorm, rotary": {
        "num_kv_heads": 4, "norm": "rms_norm", "norm_first": True, "causal": True, "rotary": tx.RotaryEmbedding(),
    },
    "ALiBi, window": {"alibi": True, "window": (4, 4), "bias": False},
}  # fmt: skip


class Model(nn.Module):
    """An encoder and a norm module of ours between what a model has besides."""

    def __init__(self, dropout=0.0, **options):
        super().__init__()
        torch.manual_seed(1)
        layer = tx.TransformerEncoderLayer(32, 8, 64, dropout=dropout, batch_first=True, dtype=torch.float64, **options)
        self.embedding = nn.Embedding(11, 32, dtype=torch.float64)
        self.encoder = tx.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = tx.ResidualLayerNorm(32, dropout=dropout, dtype=torch.float64)
        self.head = nn.Linear(32, 11, dtype=torch.float64)

    def forward(self, tokens, padding=None):
        x = self.embedding(tokens)
        return self.head(self.norm(self.encoder(x, src_key_padding_mask=padding), x))


def batches(steps=3, size=4, length=10):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 11, (steps, size, length), generator=generator)
    return tokens, torch.arange(length) >= torch.tensor([length, 7, 4, 9])[:, None]


def optimizer_of(model):
    """Two groups: DTensors and plain tensors do not go into one fused or foreach step."""
    parameters = list(model.parameters())
    groups = [[p for p in parameters if isinstance(p, DTensor) == kind] for kind in (True, False)]
    return torch.optim.AdamW([{"params": g} for g in groups if g], lr=1e-2, foreach=True)


def train(model, part=slice(None)):
    """The loss of each step on the rows `part` of each batch."""
    tokens, padding = batches()
    optimizer, losses = optimizer_of(model), []
    for batch in tokens:
        logits = model(batch[part], padding[part])
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), batch[part])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(state, expected):
    assert set(state) == set(expected)
    for name, t in expected.items():
        torch.testing.assert_close(state[name], t, msg=lambda text, name=name: f"{name}: {text}")


def own_rows(rank, world):
    return slice(rank * 4 // world, (rank + 1) * 4 // world)


def data_parallel(rank, world, options):
    single = Model(**options)
    start = copy.deepcopy(single.state_dict())
    train(single)
    model = DistributedDataParallel(Model(**options))
    train(model, own_rows(rank, world))
    compare(model.module.state_dict(), single.state_dict())
    assert any(not torch.equal(t, start[name]) for name, t in single.state_dict().items())


@pytest.mark.parametrize("name", VARIANTS)
def test_data_parallel(name, ranks2):
    ranks2.run(data_parallel, VARIANTS[name])


def test_data_parallel_on_four_ranks(ranks4):
    ranks4.run(data_parallel, VARIANTS["pre-norm"])


def sharded(rank, world, options):
    single = Model(**options)
    train(single)
    model = Model(**options)
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    for p in model.parameters():
        assert p.placements == (Shard(0),) and p.to_local().numel() < p.numel()
    train(model, own_rows(rank, world))
    for p in model.parameters():
        assert p.placements == (Shard(0),)
    compare(full_state_dict(model), single.state_dict())


@pytest.mark.parametrize("name", VARIANTS)
def test_fully_shard(name, ranks2):
    ranks2.run(sharded, VARIANTS[name])


def test_fully_shard_on_four_ranks(ranks4):
    ranks4.run(sharded, VARIANTS["post-norm"])


def tensor_parallel(rank, world, options):
    single, model = Model(**options), Model(**options)
    mesh = init_device_mesh("cpu", (world,))
    plan = tensor_parallel_plan(model)
    parallelize_module(model, mesh, plan)
    layer = model.encoder.layers[0]
    assert layer.self_attn.q_proj_weight.placements == layer.linear1.weight.placements == (Shard(0),)
    assert layer.self_attn.out_proj.weight.placements == layer.linear2.weight.placements == (Shard(1),)
    assert layer.self_attn.q_proj_weight.to_local().shape == (32 // world, 32)
    compare(full_state_dict(model), single.state_dict())
    tokens, padding = batches()
    for mode in (True, False):
        model.train(mode), single.train(mode)
        torch.testing.assert_close(model(tokens[0], padding), single(tokens[0], padding))
    model.train(), single.train()
    with Communication() as communication:
        model(tokens[0]).sum().backward()
    # per layer and direction one sum over ranks for the attention and one for the feed-forward block; the gradients of
    # the projections' biases, three vectors a layer, are all that is gathered
    expected = {"all_reduce": 2 * 2 * 2}
    if layer.self_attn.in_proj_bias is not None:
        expected["all_gather_into_tensor"] = 3 * 2
    assert communication.counts == expected, communication.counts
    model.zero_grad()
    torch.testing.assert_close(train(model), train(single))
    compare(full_state_dict(model), single.state_dict())
    assert layer.self_attn.q_proj_weight.placements == (Shard(0),)


@pytest.mark.parametrize("name", VARIANTS)
def test_tensor_parallel(name, ranks2):
    ranks2.run(tensor_parallel, VARIANTS[name])


def test_tensor_parallel_on_four_ranks(ranks4):
    ranks4.run(tensor_parallel, VARIANTS["grouped heads, RMSNorm, rotary"])


def both(rank, world):
    """fully_shard over tensor parallelism, on a mesh of two dimensions."""
    single, model = Model(), Model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], tensor_parallel_plan(model))
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh["data"])
    weight = model.encoder.layers[0].self_attn.q_proj_weight
    assert weight.to_local().shape == (8, 32) and weight.device_mesh.ndim == 2
    for module in (model.embedding, model.norm, model.head):
        fully_shard(module, mesh=mesh["data"])
    train(single)
    train(model, own_rows(mesh["data"].get_local_rank(), 2))
    compare(full_state_dict(model), single.state_dict())


def test_tensor_parallel_with_fully_shard(ranks4):
    ranks4.run(both)


def decoder(rank, world):
    """torch.nn.Transformer's drop-in: two attentions in a layer, masks of all kinds."""
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    torch.manual_seed(1)
    single = tx.Transformer(32, 4, 1, 1, 64, **options)
    model = copy.deepcopy(single)
    plan = tensor_parallel_plan(model)
    assert len(plan) == 3 * 2 + 3
    parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
    src, tgt = torch.randn(2, 7, 32, dtype=torch.float64), torch.randn(2, 5, 32, dtype=torch.float64)
    per_head = torch.rand(2 * 4, 5, 7) > 0.7
    masks = {
        "tgt_mask": single.generate_square_subsequent_mask(5, dtype=torch.float64), "memory_mask": per_head,
        "src_key_padding_mask": torch.arange(7) >= torch.tensor([[7], [4]]),
    }  # fmt: skip
    results = []
    for module in (single, model):
        inputs = [t.clone().requires_grad_() for t in (src, tgt)]
        out = module(*inputs, **masks)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)
    # whole DTensors and unbatched, sequence-first inputs
    attention = tx.MultiheadAttention(32, 4, dtype=torch.float64)
    cut = parallelize_module(copy.deepcopy(attention), init_device_mesh("cpu", (world,)), HeadParallel())
    x, y = src[0].requires_grad_(), torch.randn(6, 2, 32, dtype=torch.float64)
    torch.testing.assert_close(cut(x, x, x, need_weights=False)[0], attention(x, x, x)[0])
    torch.testing.assert_close(cut(y, y, y, need_weights=False)[0], attention(y, y, y)[0])
    shared = distribute_tensor(y, cut.mesh, [Shard(0)])
    torch.testing.assert_close(cut(shared, shared, shared, need_weights=False)[0], attention(y, y, y)[0])


def test_tensor_parallel_decoder(ranks2):
    ranks2.run(decoder)


def dropped(rank, world):
    """The masks of a tensor-parallel layer: heads and features of one's own, the rest as on the other ranks."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    layer = tx.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
    single = copy.deepcopy(layer)
    parallelize_module(layer, mesh, tensor_parallel_plan(layer))
    x, outputs = torch.randn(4, 6, 16), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append((layer(x), torch.rand(2)))
    assert all(torch.equal(a, b) for a, b in zip(outputs[0], outputs[1], strict=True))
    assert not torch.equal(outputs[0][0], outputs[2][0])
    # attention: this rank's head is what F.attention gives for it with the seed of its shard
    attention, whole = layer.self_attn, single.self_attn
    torch.manual_seed(5)
    out = attention(x, x, x, need_weights=False)[0]
    torch.manual_seed(5)
    seed = torch.randint(0, 2**62, ())
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in whole._project(x, x, x))
    heads = []
    for h in range(2):
        own = (t[:, h : h + 1] for t in (q, k, v))
        heads.append(tx.functional.attention(*own, dropout_p=0.5, dropout_seed=numbered_seed(seed, h)))
    torch.testing.assert_close(out, whole.out_proj(torch.cat(heads, 1).transpose(1, 2).flatten(-2)))
    replaced = nn.Sequential(nn.Dropout(0.25))
    tx.replace_modules(replaced)
    assert type(parallelize_module(replaced[0], mesh, ShardedDropout())) is type(layer.dropout)
    drop = parallelize_module(nn.Dropout(0.25), mesh, ShardedDropout())
    ones = torch.ones(100, 100, requires_grad=True)
    kept = drop(ones)
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs(kept.mean().item() - 1) < 0.03
    assert torch.equal(torch.autograd.grad(kept.sum(), ones)[0], kept)
    assert torch.equal(drop.eval()(ones), ones)
    return outputs[0][0].detach(), outputs[0][1], kept.detach()


def test_tensor_parallel_dropout(ranks2):
    (out, state, kept), (other_out, other_state, other_kept) = ranks2.run(dropped)
    assert torch.equal(out, other_out) and torch.equal(state, other_state)  # replicas and generators agree
    assert not torch.equal(kept, other_kept)


def data_parallel_dropout(rank, world, seed):
    model = DistributedDataParallel(Model(dropout=0.3))
    tokens, _ = batches()
    torch.manual_seed(seed if seed else 10 + rank)
    return model(tokens[0]).detach()


def test_data_parallel_dropout_follows_the_generator_of_the_rank(ranks2):
    """As torch's own: under one seed ranks draw the same, so seed them differently."""
    same = ranks2.run(data_parallel_dropout, 7)
    assert torch.equal(*same)
    assert not torch.equal(*ranks2.run(data_parallel_dropout, 0))


class Block(nn.Module):
    """A pre-norm block with norms that return the sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.norm1 = tx.ResidualRMSNorm(16, dtype=torch.float64)
        self.norm2 = tx.ResidualLayerNorm(16, return_residual=True, dtype=torch.float64)
        self.up, self.down = nn.Linear(16, 64, dtype=torch.float64), nn.Linear(64, 16, dtype=torch.float64)
        nn.init.normal_(self.norm1.weight)

    def forward(self, x):
        y, h = self.norm2(self.norm1(x, x), x)
        return self.down(torch.relu(self.up(y))) + h


def sequence_parallel(rank, world):
    """Norms on parts of the sequence, products on all of it: the residual stays sharded."""
    mesh = init_device_mesh("cpu", (world,))
    single, model = Block(), Block()
    parallelize_module(model, mesh, {
        "norm1": SequenceParallel(), "norm2": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    })  # fmt: skip
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    out, expected = model(distribute_tensor(x, mesh, [Shard(1)])), single(x)
    assert out.placements == (Shard(1),)
    torch.testing.assert_close(out.full_tensor(), expected)
    out.square().sum().backward(), expected.square().sum().backward()
    assert model.norm1.weight.placements == (Replicate(),)
    for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=name)
    # plain inputs are parts, and a residual by keyword is one as well
    norm = parallelize_module(copy.deepcopy(single.norm1), mesh, SequenceParallel(use_local_output=True))
    part = x.chunk(world, 1)[rank]
    torch.testing.assert_close(norm(part, residual=part), single.norm1(x, x).chunk(world, 1)[rank])


def test_sequence_parallel_norms(ranks2):
    ranks2.run(sequence_parallel)


class Attention(nn.Module):
    """Causal self-attention over a sequence of which each rank has a part."""

    def __init__(self, layout):
        super().__init__()
        torch.manual_seed(1)
        self.qkv, self.out = nn.Linear(16, 48, dtype=torch.float64), nn.Linear(16, 16, dtype=torch.float64)
        self.layout = layout

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.layout is None:
            return self.out(tx.functional.attention(q, k, v, causal=True).transpose(1, 2).flatten(-2))
        out = ring_attention(q, k, v, layout=self.layout, causal=True)
        return self.out(out.transpose(1, 2).flatten(-2))


def context_parallel(rank, world, layout):
    """DDP averages the gradients of the parameters over the ranks of a sequence as over those of a batch."""
    single, model = Attention(None), DistributedDataParallel(Attention(layout))
    optimizers = [torch.optim.SGD(m.parameters(), 0.5, momentum=0.9) for m in (single, model)]
    for step in range(3):
        torch.manual_seed(step)
        x, target = torch.randn(2, 16, 16, dtype=torch.float64), torch.randn(2, 16, 16, dtype=torch.float64)
        own, own_target = (shard_sequence(t, layout=layout) for t in (x, target))
        out = model(own)
        nn.functional.mse_loss(single(x), target).backward()
        nn.functional.mse_loss(out, own_target).backward()
        torch.testing.assert_close(gather_sequence(out.detach(), layout=layout), single(x))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    compare(model.module.state_dict(), single.state_dict())


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_context_parallel_training(layout, ranks2):
    ranks2.run(context_parallel, layout)


def hugging_face(rank, world, folder):
    """transformers' own tensor parallelism hands local heads to the attention."""
    import transformers

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    tx.huggingface.register()
    load = transformers.LlamaForCausalLM.from_pretrained
    models = [load(folder, attn_implementation="tformer_ext", **more) for more in ({}, {"tp_plan": "auto"})]
    weights = [model.model.layers[0].self_attn.q_proj.weight for model in models]
    assert weights[1].placements == (Shard(0),)
    tokens = torch.randint(0, 64, (2, 9))
    results = []
    for model, weight in zip(models, weights, strict=True):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        gradient = weight.grad.full_tensor() if isinstance(weight, DTensor) else weight.grad
        results.append((loss, gradient, model(tokens[:1, :4]).logits))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.slow
def test_tensor_parallelism_of_transformers(ranks2, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    ranks2.run(hugging_face, str(tmp_path))


def errors(rank, world):
    mesh = init_device_mesh("cpu", (world,))

    def apply(style, module):
        return parallelize_module(module, mesh, style())

    def cut(**options):
        return apply(HeadParallel, tx.MultiheadAttention(**{"embed_dim": 24, "num_heads": 4, **options}))

    x = torch.randn(3, 2, 24)
    for error, message, call in [
        (ValueError, "num_heads: expected a multiple of the 2 ranks, got 3", lambda: cut(num_heads=3)),
        (ValueError, "num_kv_heads: expected a multiple", lambda: cut(num_kv_heads=1)),
        (ValueError, "add_bias_kv, add_zero_attn", lambda: cut(add_zero_attn=True)),
        (ValueError, "need_weights: expected False", lambda: cut()(x, x, x)),
        (TypeError, "HeadParallel: expected", lambda: apply(HeadParallel, nn.MultiheadAttention(8, 2))),
        (TypeError, "ShardedDropout: expected", lambda: apply(ShardedDropout, nn.ReLU())),
    ]:  # fmt: skip
        with raises(error, message):
            call()


def test_errors_name_the_argument(ranks2):
    ranks2.run(errors)


def test_plans_for_nothing_are_refused():
    with pytest.raises(ValueError, match="model: expected one that holds"):
        tensor_parallel_plan(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: expected one that holds"):
        tensor_parallel_plan(tx.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="replace_modules"):
        tensor_parallel_plan(nn.TransformerEncoderLayer(8, 2))
