"""Transformer modules as part of torch: copies, hooks, replaced parts, compile, export, autocast, checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformer_cases import FF, PADDING, E, H, N, S, T, attention_mask, layer_pair, no_fast_path, sequence

import tformer_ext as tx

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:.*nested.tensor")
NAMES = ["TransformerEncoderLayer", "TransformerDecoderLayer"]


def inputs_of(name, dtype=torch.float32):
    return [sequence(dtype=dtype)] + [sequence(dtype=dtype)] * ("Decoder" in name)


def layer(name="TransformerEncoderLayer", dropout=0.0, **options):
    return getattr(tx, name)(E, H, FF, dropout, batch_first=True, **options)


@pytest.mark.parametrize("name", NAMES)
def test_copies(name):
    module, inputs = layer(name, rotary=tx.RotaryEmbedding(), num_kv_heads=1), inputs_of(name)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(twin(*inputs), module(*inputs)) and repr(twin) == repr(module)


def test_a_layer_that_torch_pickled_becomes_ours():
    """Attributes that only our constructors set have defaults."""
    ours, stock = layer_pair(batch_first=True)
    stock.__class__ = tx.TransformerEncoderLayer
    stock.self_attn.__class__ = tx.MultiheadAttention
    torch.testing.assert_close(stock(x := sequence()), ours(x))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_hooks_fire_and_change_nothing(name, norm_first):
    module, inputs = layer(name, norm_first=norm_first), inputs_of(name)
    expected = module(*inputs)
    seen = []
    for path, part in module.named_modules():
        part.register_forward_hook(lambda m, args, out, path=path: seen.append(path))
    torch.testing.assert_close(module(*inputs), expected)
    assert sorted(seen) == sorted(path for path, _ in module.named_modules())
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(*inputs), expected)


def test_hooks_may_change_results():
    module, x = layer(), sequence(dtype=torch.float32)
    handles = [module.norm1.register_forward_hook(lambda m, args, out: out * 0)]
    module.linear1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    seen = []
    module(x)
    assert seen[0].eq(0).all()
    handles[0].remove()
    module.dropout1.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append("backward"))
    module(x).sum().backward()
    assert seen[-1] == "backward"


def test_global_hooks_fire():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m)))
    try:
        layer()(sequence(dtype=torch.float32))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 2 and seen.count(nn.LayerNorm) == 2 and seen.count(nn.Dropout) == 3


class LowRank(nn.Module):
    """As LoRA wraps a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", NAMES)
def test_replaced_parts(name):
    module, inputs = layer(name), inputs_of(name)
    for owner, part in ((module, "linear1"), (module, "linear2"), (module.self_attn, "out_proj")):
        before = module(*inputs)
        setattr(owner, part, LowRank(getattr(owner, part)))
        after = module(*inputs)
        assert not torch.allclose(before, after)
        after.sum().backward()
        assert getattr(owner, part).up.weight.grad.ne(0).any()
    module.self_attn.out_proj = module.self_attn.out_proj.base
    expected = module(*inputs)
    stock = nn.MultiheadAttention(E, H, batch_first=True)
    stock.load_state_dict(module.self_attn.state_dict())
    module.self_attn = stock
    torch.testing.assert_close(module(*inputs), expected)


@pytest.mark.parametrize("training", [True, False])
def test_replaced_norms_dropouts_and_activation(training):
    for norm_first in (False, True):
        ours, stock = (m.train(training) for m in layer_pair(batch_first=True, norm_first=norm_first))
        for m in (ours, stock):
            torch.manual_seed(0)
            m.norm1, m.norm2 = nn.Identity(), nn.LayerNorm(E, elementwise_affine=False)
            m.dropout1, m.dropout2, m.activation = nn.Hardtanh(), nn.Tanh(), torch.sigmoid
        x = sequence()
        with no_fast_path():
            torch.testing.assert_close(ours(x), stock(x))


def test_blocks_of_a_subclass_are_called():
    class Mine(tx.TransformerEncoderLayer):
        def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
            out, weights = self.self_attn(x, x, x, key_padding_mask, True, attn_mask)
            self.weights = weights.detach()
            return self.dropout1(out)

    torch.manual_seed(3)
    mine = Mine(E, H, FF, 0.0, batch_first=True, dtype=torch.float64)
    ours, x = layer_pair(batch_first=True)[0], sequence()
    for norm_first in (False, True):
        mine.norm_first = ours.norm_first = norm_first
        torch.testing.assert_close(mine.eval()(x, attention_mask("bool"), PADDING).shape, x.shape)
        torch.testing.assert_close(mine(x, None, PADDING), ours(x, None, PADDING))
        assert mine.weights.shape == (N, S, S)
    ours._ff_block = lambda x: x * 0
    torch.testing.assert_close(ours(x), x + ours.dropout1(ours.self_attn(y := ours.norm1(x), y, y)[0]))
    with pytest.raises(ValueError, match="cache: expected None with a _sa_block of Mine"):
        tx.TransformerEncoder(mine, 1)(x, cache=tx.KeyValueCache())


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "norm": "rms_norm"}], ids=["post-norm", "pre-norm"])
def test_compile(options):
    """In one graph, with masks and all options."""
    torch._dynamo.reset()
    options |= {"num_kv_heads": 1, "causal": True, "window": (3, 3), "alibi": True, "rotary": tx.RotaryEmbedding()}
    model = layer("TransformerDecoderLayer", **options)
    tgt, memory = sequence(T, dtype=torch.float32), sequence(dtype=torch.float32)
    mask = attention_mask("causal float", T, T, torch.float32)

    def step(tgt, memory):
        return model(tgt, memory, mask, memory_key_padding_mask=PADDING)

    out, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(tgt, memory), step(tgt, memory)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(t.square().sum(), list(model.parameters())) for t in (out, expected)]
    torch.testing.assert_close(*grads)


def test_compile_of_stacks_in_eval():
    torch._dynamo.reset()
    model = tx.Transformer(E, H, 1, 1, FF, batch_first=True).eval()
    src, tgt, mask = torch.randn(N, S, E), torch.randn(N, T, E), attention_mask("causal float", T, T, torch.float32)

    def step(src, tgt):
        return model(src, tgt, tgt_mask=mask, src_key_padding_mask=PADDING, memory_key_padding_mask=PADDING)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(src, tgt), step(src, tgt))


def test_export_with_a_length_that_varies():
    encoder, x = tx.TransformerEncoder(layer(), 1).eval(), torch.randn(N, S, E)
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {"src": {1: length}, "src_key_padding_mask": {1: length}}
    program = torch.export.export(encoder, (x,), {"src_key_padding_mask": PADDING}, dynamic_shapes=shapes)
    x, hidden = torch.randn(N, 13, E), torch.arange(13) >= torch.tensor([13, 2, 7])[:, None]
    exported = program.module()(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(exported, encoder(x, src_key_padding_mask=hidden))


def test_compiled_training_with_dropout():
    torch._dynamo.reset()
    model, x = layer(dropout=0.5), sequence(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    second.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm_first", [True, False])
def test_autocast(name, norm_first):
    ours, stock = layer_pair(name, batch_first=True, norm_first=norm_first)
    ours, stock, inputs = ours.float(), stock.float(), inputs_of(name)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(*inputs), stock(*inputs)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)
    a.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(reentrant):
    model = layer(dropout=0.3)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        x = torch.linspace(-1, 1, N * S * E).view(N, S, E).requires_grad_()
        out = run(x)
        model.zero_grad()
        out.square().sum().backward()
        grads.append([out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm_first", [True, False])
def test_dropout_follows_the_seed_and_the_mode(name, norm_first):
    module, inputs = layer(name, dropout=0.4, norm_first=norm_first), inputs_of(name)
    torch.manual_seed(1)
    first = module(*inputs)
    assert not torch.equal(first, module(*inputs))
    torch.manual_seed(1)
    assert torch.equal(module(*inputs), first)
    module.eval()
    assert torch.equal(module(*inputs), module(*inputs))
    none = layer(name, norm_first=norm_first)
    none.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(*inputs), none(*inputs))


def test_dropout_has_the_distribution_of_torchs():
    """Mean and variance of the outputs of many passes over one input."""
    torch.manual_seed(3)
    stock = nn.TransformerEncoderLayer(E, H, FF, 0.3, norm_first=True, batch_first=True)
    ours = tx.TransformerEncoderLayer(E, H, FF, 0.3, norm_first=True, batch_first=True)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(1, 3, E).expand(20000, 3, E)
    with torch.no_grad():
        a, b = ours(x), stock(x)
    error = b.std(0) / 20000**0.5
    assert ((a.mean(0) - b.mean(0)).abs() < 6 * error).all()
    torch.testing.assert_close(a.std(0), b.std(0), rtol=0.06, atol=0)


def test_gradients_of_gradients_and_functional_transforms():
    model = layer(dtype=torch.float64)
    x = torch.randn(1, 3, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(model, (x,))
    rows = torch.randn(4, 1, 3, E, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(model)(rows), torch.stack([model(t) for t in rows]))
    gradient = torch.func.grad(lambda p, x: torch.func.functional_call(model, p, x).square().sum())
    single = gradient(dict(model.named_parameters()), rows[0])
    model(rows[0]).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(single[name], p.grad)


def test_meta_device_and_moves():
    model = tx.Transformer(E, H, 1, 1, FF, batch_first=True, device="meta", rotary=tx.RotaryEmbedding(), alibi=True)
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(2, 3, E, device="meta"), torch.empty(2, 4, E, device="meta")).shape == (2, 4, E)
    real = model.to_empty(device="cpu")
    for p in real.parameters():
        nn.init.ones_(p)
    assert real(torch.randn(2, 3, E), torch.randn(2, 4, E)).shape == (2, 4, E)
