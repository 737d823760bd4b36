"""TransformerEncoder, TransformerDecoder and Transformer against torch.nn's, and all modules on torch's own samples."""

import warnings

import pytest
import torch
from torch import nn
from transformer_cases import FF, PADDING, E, H, N, S, T, attention_mask, compare, pair, sequence

import tformer_ext as tx
from tformer_ext.bench.harness import Contender, extra_bytes

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:.*nested.tensor")


def transformers(dropout=0.0, **options):
    return pair("Transformer", E, H, 2, 2, FF, dropout, batch_first=True, **options)


def encoders(norm=True, layers=2, **options):
    """Our encoder of our layers and torch's of torch's."""
    made = []
    for package in (tx, nn):
        torch.manual_seed(3)
        layer = package.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True, dtype=torch.float64)
        last = nn.LayerNorm(E, dtype=torch.float64) if norm else None
        made.append(package.TransformerEncoder(layer, layers, last, **options))
    return made


def watch_attention(monkeypatch):
    """List to which every call of F.attention adds its options."""
    seen, attention = [], tx.functional.attention

    def watched(*tensors, **options):
        seen.append(options)
        return attention(*tensors, **options)

    monkeypatch.setattr(tx.functional, "attention", watched)
    return seen


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "bias": False}, {"activation": "gelu"}], ids=str)
def test_transformer(options):
    ours, stock = transformers(**options)
    a, b = ours.state_dict(), stock.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
    assert repr(ours) == repr(stock) and isinstance(ours, nn.Transformer)
    assert (ours.d_model, ours.nhead, ours.batch_first) == (E, H, True)
    ours.load_state_dict(b)
    masks = {"tgt_mask": attention_mask("causal float", T, T), "memory_key_padding_mask": PADDING}
    masks |= {"src_key_padding_mask": PADDING, "src_mask": attention_mask("bool")}
    for training in (True, False):
        ours.train(training), stock.train(training)
        compare(ours, stock, [sequence(), sequence(T)], lambda m, x, y: m(x, y))
        compare(ours, stock, [sequence(), sequence(T)], lambda m, x, y: m(x, y, **masks))
        compare(ours, stock, [sequence()[0], sequence(T)[0]], lambda m, x, y: m(x, y))


@pytest.mark.parametrize("hint", [None, False, True])
@pytest.mark.parametrize("mask", ["causal float", "causal bool"])
def test_causal_masks_in_stacks(mask, hint):
    mask = attention_mask(mask)
    for padding in (None, PADDING):
        compare(*encoders(), [sequence()], lambda m, x, p=padding: m(x, mask, p, is_causal=hint))
        options = {"tgt_mask": mask, "tgt_is_causal": hint, "tgt_key_padding_mask": padding}
        decoders = [m.decoder for m in transformers()]
        compare(*decoders, [sequence(), sequence()], lambda m, x, y, o=options: m(x, y, **o))


def test_the_causal_mask_is_recognised(monkeypatch):
    """Then nothing of its size is made, and the kernels skip what it hides."""
    seen = []
    attention = tx.functional.attention
    monkeypatch.setattr(
        tx.functional, "attention", lambda *t, **options: seen.append(options) or attention(*t, **options)
    )
    encoder, _ = encoders()
    x = torch.randn(2, 300, E, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(300, dtype=torch.float64)
    for mask in (causal, causal < 0):
        seen.clear()
        encoder(x, mask)
        assert [options["causal"] for options in seen] == ["upper_left"] * 2
        assert all("bias" not in options and "mask" not in options for options in seen)
    for at, value in (((150, 20), -1.0), ((20, 150), 0.0), ((200, 200), 0.5), ((299, 0), 1e-3), ((10, 11), torch.nan)):
        seen.clear()
        other = causal.clone()
        other[at] = value
        encoder(x, other)
        assert all("causal" not in options and "bias" in options for options in seen), (at, value)


@pytest.mark.parametrize(
    ("causal", "hidden"), [(None, None), (None, "end"), ("causal float", None), ("causal bool", "begin")]
)
def test_memory_grows_with_the_length_not_its_square(causal, hidden):
    """A training step at a length whose square, in bytes, is far more than all activations."""
    length = 3072
    layer = tx.TransformerEncoderLayer(E, H, FF, 0.1, batch_first=True)
    x, mask = torch.randn(1, length, E), attention_mask(causal, length, length, torch.float32)
    padding = torch.arange(length)[None] >= 2000
    padding = None if hidden is None else padding if hidden == "end" else padding.flip(1)
    leaves = list(layer.parameters())

    def step():
        return torch.autograd.grad(layer(x, mask, padding).sum(), leaves)

    step()
    assert extra_bytes(Contender("step", step)) < length * length


def test_padding_at_the_end_becomes_lengths(monkeypatch):
    seen = []
    attention = tx.functional.attention
    monkeypatch.setattr(
        tx.functional, "attention", lambda *t, **options: seen.append(options) or attention(*t, **options)
    )
    encoder, _ = encoders(layers=1)
    floating = torch.zeros(N, S, dtype=torch.float64).masked_fill(PADDING, -torch.inf)
    for padding in (PADDING, floating):
        seen.clear()
        encoder(sequence(), src_key_padding_mask=padding)
        assert list(seen[0]) == ["key_lengths"] and seen[0]["key_lengths"].tolist() == [5, 3, 4]
    seen.clear()
    encoder(sequence(), src_key_padding_mask=PADDING.flip(1))
    assert list(seen[0]) == ["mask"] and seen[0]["mask"].shape == (N, 1, 1, S)
    seen.clear()
    encoder(sequence(), src_key_padding_mask=floating * 0 + torch.linspace(0, 1, S, dtype=torch.float64))
    assert list(seen[0]) == ["bias"]


def test_the_encoder_makes_no_nested_tensors():
    """Padded inputs keep their shape, and padded positions what the layers give them, in train and eval alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = encoders()[0].eval()
    assert encoder.enable_nested_tensor and not encoder.use_nested_tensor
    x = sequence()
    long = torch.arange(S) >= torch.tensor([3, 2, 1])[:, None]
    with torch.no_grad():
        out = encoder(x, src_key_padding_mask=long)
    assert out.shape == x.shape and not out.is_nested
    torch.testing.assert_close(out, encoder.train()(x, src_key_padding_mask=long))
    _, stock = encoders(enable_nested_tensor=False)
    torch.testing.assert_close(out, stock(x, src_key_padding_mask=long))


def test_our_layer_in_torchs_encoder():
    """torch's encoder hands nested tensors to its layers in eval; ours takes them."""
    _, stock = encoders()
    layer = tx.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True, dtype=torch.float64)
    mixed = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E, dtype=torch.float64))
    mixed.load_state_dict(stock.state_dict())
    assert mixed.use_nested_tensor
    x = sequence()
    for training in (True, False):
        mixed.train(training), stock.train(training)
        with torch.no_grad():
            a, b = (m(x, src_key_padding_mask=PADDING) for m in (mixed, stock))
        torch.testing.assert_close(a, b)
    compare(mixed, stock, [x], lambda m, x: m(x, attention_mask("causal float"), PADDING))


def test_nested_inputs_of_a_layer():
    layer = tx.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True)
    parts = [torch.randn(3, E), torch.randn(5, E)]
    nested = torch.nested.nested_tensor(parts)
    for part, out in zip(parts, layer(nested).unbind(), strict=True):
        torch.testing.assert_close(out, layer(part))
    with pytest.raises(ValueError, match="src: expected no masks"):
        layer(nested, torch.zeros(5, 5))


def test_torchs_layer_in_our_stacks():
    for name in ("encoder", "decoder"):
        ours, stock = (getattr(m, name) for m in transformers())
        ours.layers = stock.layers
        inputs = [sequence()] if name == "encoder" else [sequence(T), sequence()]
        compare(ours, stock, inputs, lambda m, *t: m(*t))


def test_custom_stacks():
    encoder, decoder = encoders()[0], nn.Identity()
    model = tx.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)
    assert model.encoder is encoder and model.decoder is decoder


@pytest.mark.parametrize("inputs", [((S, 2, E), (T, 3, E)), ((S, 2, 4), (T, 2, E)), ((S, 2, E), (T, 2, 4))], ids=str)
def test_transformer_errors(inputs):
    messages = []
    for package in (tx, nn):
        model = package.Transformer(E, H, 1, 1, FF)
        with pytest.raises(RuntimeError) as caught:
            model(*(torch.randn(shape) for shape in inputs))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_encoder_errors():
    for m in encoders():
        with pytest.raises(AssertionError, match="only bool and floating types of mask are supported"):
            m(sequence(), torch.zeros(S, S, dtype=torch.int32))
        with pytest.raises(AssertionError, match="only bool and floating types of src_key_padding_mask are supported"):
            m(sequence(), None, torch.zeros(N, S, dtype=torch.int32))


@pytest.fixture(scope="module")
def common_modules():
    """torch's own samples; importing them forbids setting flags of torch.backends, which is undone."""
    module = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    return module


STACKED = ["TransformerEncoder", "Transformer"]  # a sample of the encoder holds a layer of torch's, which stays


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", *STACKED])
def test_torchs_module_samples(name, training, common_modules):
    sampler = getattr(common_modules, f"module_inputs_torch_nn_{name}")
    samples = list(sampler(None, "cpu", torch.float64, requires_grad=False, training=training))
    assert len(samples) >= 32
    for sample in samples:
        made = []
        for package in (tx, nn):
            torch.manual_seed(3)
            module = getattr(package, name)(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            made.append(module.double().train(training))
        made[0].load_state_dict(made[1].state_dict())
        outs = [m(*sample.forward_input.args, **sample.forward_input.kwargs) for m in made]
        outs = [out if isinstance(out, tuple) else (out,) for out in outs]
        for a, b in zip(*outs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
