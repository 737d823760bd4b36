"""TransformerEncoderLayer and TransformerDecoderLayer against torch.nn's: weights, values, gradients, errors."""

import itertools
import warnings

import pytest
import torch
from tolerances import DTYPES, assert_close, yardstick_dtype
from torch import nn
from transformer_cases import (
    FF,
    LEFT_PADDING,
    MASKS,
    PADDING,
    E,
    H,
    N,
    S,
    T,
    attention_mask,
    compare,
    layer_pair,
    padding_mask,
    sequence,
)

import tformer_ext as tx

NAMES = ["TransformerEncoderLayer", "TransformerDecoderLayer"]
ACTIVATIONS = ["relu", "gelu", nn.functional.silu, nn.ReLU(), nn.GELU(), nn.GELU("tanh"), torch.tanh]
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:.*nested.tensor")


def arguments(norm_first, activation, bias, batch_first):
    return {"norm_first": norm_first, "activation": activation, "bias": bias, "batch_first": batch_first}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_weights_and_layout(name, bias, norm_first):
    ours, stock = layer_pair(name, dropout=0.1, bias=bias, norm_first=norm_first)
    a, b = ours.state_dict(), stock.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
    assert repr(ours) == repr(stock) and isinstance(ours, type(stock))
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()]
    nn.init.normal_(next(stock.parameters()))
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    public = {key for key in stock.__dict__ if not key.startswith("_")}
    assert public <= set(ours.__dict__) and all(getattr(ours, k) == getattr(stock, k) for k in public)


def test_random_numbers_go_on_as_after_torchs_constructor():
    drawn = []
    for package in (tx, nn):
        torch.manual_seed(1)
        package.TransformerDecoderLayer(E, H, FF)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("padding", [None, "bool", "float", "left"])
def test_encoder_masks(mask, padding, training):
    mask = attention_mask(mask)
    hidden = LEFT_PADDING.logical_and(torch.arange(S) > 0) if padding == "left" else PADDING
    padding = padding_mask("bool" if padding == "left" else padding, hidden)
    for norm_first in (False, True):
        ours, stock = (m.train(training) for m in layer_pair(norm_first=norm_first, batch_first=True))
        compare(ours, stock, [sequence()], lambda m, x: m(x, mask, padding))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", [None, "bool 3d", "float", "causal float"])
@pytest.mark.parametrize("memory_mask", [None, "bool", "float 3d"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
def test_decoder_masks(mask, memory_mask, padding, training):
    tgt_mask, memory_mask = attention_mask(mask, T, T), attention_mask(memory_mask, T)
    paddings = {
        "tgt_key_padding_mask": padding_mask(padding, torch.arange(T) >= torch.tensor([7, 2, 6])[:, None]),
        "memory_key_padding_mask": padding_mask(padding),
    }
    ours, stock = (m.train(training) for m in layer_pair("TransformerDecoderLayer", batch_first=True))
    compare(ours, stock, [sequence(T), sequence()], lambda m, x, mem: m(x, mem, tgt_mask, memory_mask, **paddings))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "__name__", str(a)))
def test_constructors(name, activation):
    causal, memory = attention_mask("causal float", T, T), [sequence()] if "Decoder" in name else []
    for norm_first, bias, batch_first in itertools.product((False, True), repeat=3):
        ours, stock = layer_pair(name, **arguments(norm_first, activation, bias, batch_first))
        inputs = [t if batch_first else t.transpose(0, 1) for t in (sequence(T), *memory)]
        compare(ours, stock, inputs, lambda m, *t: m(*t, causal))
        compare(ours.eval(), stock.eval(), inputs, lambda m, *t: m(*t))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(batch_first, training):
    masks = [None, attention_mask("bool", T, T), attention_mask("float 3d", T, T)[:H]]
    padding = torch.arange(T) > 4
    for mask in masks:
        ours, stock = (m.train(training) for m in layer_pair(batch_first=batch_first))
        compare(ours, stock, [sequence(T)[0]], lambda m, x, k=mask: m(x, k, padding))
        ours, stock = (m.train(training) for m in layer_pair("TransformerDecoderLayer", batch_first=batch_first))
        compare(ours, stock, [sequence(T)[0], sequence()[0]], lambda m, x, y, k=mask: m(x, y, k))


@pytest.mark.parametrize("mask", ["causal float", "causal bool"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("hint", [True, False])
def test_causal_hints(mask, padding, hint):
    mask, padding = attention_mask(mask), padding_mask(padding)
    ours, stock = layer_pair(batch_first=True)
    compare(ours, stock, [sequence()], lambda m, x: m(x, mask, padding, is_causal=hint))
    ours, stock = layer_pair("TransformerDecoderLayer", batch_first=True)
    options = {"tgt_mask": mask, "tgt_key_padding_mask": padding, "tgt_is_causal": hint, "memory_mask": mask}
    options["memory_is_causal"] = hint
    compare(ours, stock, [sequence(), sequence()], lambda m, x, y: m(x, y, **options))


def test_a_wrong_hint_means_what_it_means_to_torch():
    """The mask counts wherever torch looks at it, which is where keys are padded too."""
    mask = attention_mask("bool")
    ours, stock = layer_pair(batch_first=True)
    for padding in (None, PADDING):
        compare(ours, stock, [sequence()], lambda m, x, p=padding: m(x, mask, p, is_causal=True))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_eval_is_torchs_fast_path(norm_first, activation):
    x = sequence()
    for mask in (None, "bool", "causal bool", "causal float"):
        mask = attention_mask(mask)
        for padding in (None, PADDING):
            ours, stock = layer_pair(norm_first=norm_first, activation=activation, batch_first=True)
            with torch.no_grad():
                torch.testing.assert_close(ours.eval()(x, mask, padding), stock.eval()(x, mask, padding))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_first", [True, False])
def test_dtypes(dtype, norm_first):
    d, heads, length = 48, 4, 33
    torch.manual_seed(3)
    stock = nn.TransformerEncoderLayer(d, heads, 96, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    ours = tx.TransformerEncoderLayer(d, heads, 96, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    ours.load_state_dict(stock.state_dict())
    x, hidden = torch.randn(4, length, d), torch.arange(length) >= torch.tensor([33, 20, 32, 1])[:, None]
    outcome = []
    for module, kind in ((ours, dtype), (stock, torch.float64), (stock, yardstick_dtype(dtype))):
        module = module.to(dtype).to(kind)  # all start from weights of dtype
        t = x.to(dtype).to(kind).detach().requires_grad_()
        out = module(t, None, hidden)
        out.square().sum().backward()
        outcome.append([out.detach(), t.grad, *(p.grad.clone() for p in module.parameters())])
        module.zero_grad()
        stock.float().load_state_dict(ours.float().state_dict())
    names = ["output", "x", *(name for name, _ in ours.named_parameters())]
    for name, a, golden, yardstick in zip(names, *outcome, strict=True):
        assert_close(a, golden, yardstick, name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_rows_that_may_attend_to_nothing(norm_first, training):
    """A padded entry and a masked row: the attention adds only out_proj's bias, no NaN and finite gradients."""
    mask = torch.zeros(S, S, dtype=torch.bool)
    mask[2] = True
    hidden = PADDING.clone()
    hidden[1] = True
    for name in NAMES:
        ours = layer_pair(name, norm_first=norm_first, batch_first=True)[0].train(training)
        nn.init.normal_(ours.self_attn.out_proj.bias)
        x = sequence().requires_grad_()
        more = (sequence(),) if "Decoder" in name else ()
        masks = (mask, None, hidden) if more else (mask, hidden)
        out = ours(x, *more, *masks)
        out.sum().backward()
        assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in ours.parameters())
        y = ours.norm1(x) if norm_first else x
        for masked in ({"attn_mask": mask}, {"key_padding_mask": hidden}):
            attended = ours.self_attn(y, y, y, need_weights=False, **masked)[0]
            rows = attended[:, 2] if "attn_mask" in masked else attended[1]
            torch.testing.assert_close(rows, ours.self_attn.out_proj.bias.expand_as(rows))


def errors():
    x = torch.randn(S, N, E, dtype=torch.float64)
    yield "TransformerEncoderLayer", (x, torch.zeros(S, S, dtype=torch.int32)), {}
    yield "TransformerEncoderLayer", (x, None, torch.zeros(N, S, dtype=torch.int64)), {}
    yield "TransformerEncoderLayer", (x, torch.zeros(S, S + 1)), {}
    yield "TransformerEncoderLayer", (x, torch.zeros(N, S, S)), {}
    yield "TransformerEncoderLayer", (x,), {"is_causal": True}
    yield "TransformerEncoderLayer", (x[..., :4],), {}
    yield "TransformerEncoderLayer", (x[None],), {}
    yield "TransformerDecoderLayer", (x, x, torch.zeros(S, S, dtype=torch.int32)), {}
    yield "TransformerDecoderLayer", (x, x), {"tgt_is_causal": True}
    yield "TransformerDecoderLayer", (x, x), {"memory_is_causal": True}
    yield "TransformerDecoderLayer", (x, x, torch.zeros(S + 1, S)), {}


@pytest.mark.parametrize(("name", "inputs", "options"), list(errors()))
def test_errors_are_torchs(name, inputs, options):
    ours, stock = layer_pair(name)
    with pytest.raises(Exception) as expected:
        stock(*inputs, **options)
    with pytest.raises(type(expected.value)) as actual:
        ours(*inputs, **options)
    assert str(actual.value) == str(expected.value)


def test_constructor_errors():
    for package in (tx, nn):
        with pytest.raises(RuntimeError, match="activation should be relu/gelu, not silu"):
            package.TransformerEncoderLayer(E, H, activation="silu")
        with pytest.raises(AssertionError, match="divisible"):
            package.TransformerDecoderLayer(E, 3)
    with pytest.raises(ValueError, match="norm: expected 'layer_norm' or 'rms_norm', got 'batch'"):
        tx.TransformerEncoderLayer(E, H, norm="batch")


def test_mismatched_masks_warn_as_torchs():
    ours, _ = layer_pair(batch_first=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours(sequence(), attention_mask("float"), PADDING)
    assert [str(w.message)[:30] for w in caught] == ["Support for mismatched key_pad"]


@pytest.mark.parametrize("shape", [(0, S, E), (N, 0, E)], ids=str)
def test_empty(shape):
    ours, stock = layer_pair(batch_first=True)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ours(x), stock(x))
