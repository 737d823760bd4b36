"""What the modules offer beyond torch.nn: grouped heads, causal, windows, ALiBi, rotary embedding, RMSNorm, a cache."""

import copy
import math

import pytest
import torch
from torch import nn
from transformer_cases import FF, LEFT_PADDING, PADDING, E, H, N, S, T, attention_mask, sequence

import tformer_ext as tx

D = E // H


def rotate(x, base=10000.0, dim=None, interleaved=False, first=0):
    """x (B, H, S, D), one position and one pair at a time, by complex numbers."""
    out, dim = x.clone(), dim or x.shape[-1]
    for s in range(x.shape[2]):
        for n in range(dim // 2):
            a, b = (2 * n, 2 * n + 1) if interleaved else (n, n + dim // 2)
            angle = (s + first) * base ** (-2 * n / dim)
            z = torch.complex(x[:, :, s, a], x[:, :, s, b]) * complex(math.cos(angle), math.sin(angle))
            out[:, :, s, a], out[:, :, s, b] = z.real, z.imag
    return out


def written_out(m, x, hidden=None, rotary=None, bias=None):
    """Self-attention of m with a matrix of scores: hidden bool and bias broadcast to (N, H, S, S)."""
    heads, kv_heads = m.num_heads, m.num_kv_heads or m.num_heads
    widths = (heads * D, kv_heads * D, kv_heads * D)
    parts = zip(m.in_proj_weight.split(widths), m.in_proj_bias.split(widths), strict=True)
    q, k, v = (nn.functional.linear(x, w, b).unflatten(-1, (-1, D)).transpose(1, 2) for w, b in parts)
    if rotary is not None:
        q, k = rotate(q, **rotary), rotate(k, **rotary)
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    scores = scores if bias is None else scores + bias
    scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1)
    return m.out_proj((weights @ v).transpose(1, 2).flatten(-2)), weights.mean(1)


def attention(**options):
    return tx.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **options)


def distance(L=S):
    return torch.arange(L)[:, None] - torch.arange(L)


OPTIONS = {
    "grouped": ({"num_kv_heads": 1}, {}),
    "causal": ({"causal": True}, {"hidden": distance() < 0}),
    "window": ({"window": (1, 2)}, {"hidden": (distance() > 1) | (distance() < -2)}),
    "causal window": ({"causal": True, "window": (2, 0)}, {"hidden": (distance() > 2) | (distance() < 0)}),
    "alibi": ({"alibi": True}, {"bias": -torch.tensor([2**-4, 2**-8]).view(2, 1, 1) * distance().abs()}),
    "rotary": ({"rotary": tx.RotaryEmbedding()}, {"rotary": {}}),
    "interleaved": (
        {"rotary": tx.RotaryEmbedding(100.0, 2, True)},
        {"rotary": {"base": 100.0, "dim": 2, "interleaved": True}},
    ),
    "all": (
        {"num_kv_heads": 1, "causal": True, "window": (3, 0), "alibi": True, "rotary": tx.RotaryEmbedding()},
        {
            "hidden": (distance() > 3) | (distance() < 0),
            "bias": -torch.tensor([2**-4, 2**-8]).view(2, 1, 1) * distance().abs(),
            "rotary": {},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_options(name):
    options, meaning = OPTIONS[name]
    m, x = attention(**options), sequence().requires_grad_()
    nn.init.normal_(m.in_proj_bias)
    expected = written_out(m, x, **meaning)
    expected_grads = torch.autograd.grad(expected[0].square().sum(), [x, *m.parameters()])
    for need_weights in (False, True):
        out, weights = m(x, x, x, need_weights=need_weights)
        torch.testing.assert_close(out, expected[0])
        if need_weights:
            torch.testing.assert_close(weights, expected[1])
        grads = torch.autograd.grad(out.square().sum(), [x, *m.parameters()])
        for a, b in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b)
    mask, hidden = attention_mask("bool"), meaning.get("hidden", torch.zeros(S, S, dtype=torch.bool))
    mask.fill_diagonal_(False)
    expected = written_out(m, x, **{**meaning, "hidden": hidden | mask})[0]
    torch.testing.assert_close(m(x, x, x, attn_mask=mask)[0], expected)
    expected = written_out(m, x, **{**meaning, "hidden": hidden | PADDING[:, None, None]})[0]
    alive = ~(hidden | PADDING[:, None, None]).all(-1).transpose(1, 2).squeeze(-1)
    torch.testing.assert_close(m(x, x, x, key_padding_mask=PADDING)[0][alive], expected[alive])


def test_grouped_heads_between_sequences():
    m = attention(num_kv_heads=1, kdim=6, vdim=4)
    shapes = {name: tuple(p.shape) for name, p in m.named_parameters()}
    assert shapes["q_proj_weight"] == (E, E) and shapes["k_proj_weight"] == (D, 6) and shapes["v_proj_weight"] == (D, 4)
    assert shapes["in_proj_bias"] == (E + 2 * D,)
    full = attention(kdim=6, vdim=4)
    state = {k: v.clone() for k, v in m.state_dict().items()}
    for name in ("k_proj_weight", "v_proj_weight"):
        state[name] = state[name].repeat(H, 1)
    q, k, v = m.in_proj_bias.detach().split((E, D, D))
    state["in_proj_bias"] = torch.cat([q, k.repeat(H), v.repeat(H)])
    full.load_state_dict(state)
    inputs = [torch.randn(N, n, d, dtype=torch.float64) for n, d in ((T, E), (S, 6), (S, 4))]
    torch.testing.assert_close(m(*inputs)[0], full(*inputs)[0])
    packed = attention(num_kv_heads=1)
    assert packed.in_proj_weight.shape == (E + 2 * D, E) and "num_kv_heads=1" in repr(packed)
    assert attention(num_kv_heads=H).state_dict().keys() == attention().state_dict().keys()


def test_slopes_are_those_of_the_paper():
    slopes = tx.modules.positions.alibi_slopes
    torch.testing.assert_close(slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    torch.testing.assert_close(slopes(12), torch.cat([2.0 ** -torch.arange(1.0, 9.0), 2.0 ** -torch.arange(0.5, 4.5)]))


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_rms_norm(name, norm_first):
    """Against torch's layer with its norms replaced."""
    options = {"batch_first": True, "norm_first": norm_first, "dtype": torch.float64}
    ours = getattr(tx, name)(E, H, FF, 0.0, norm="rms_norm", **options)
    stock = getattr(nn, name)(E, H, FF, 0.0, **options)
    assert not any("norm" in key and "bias" in key for key in ours.state_dict())
    for key in [key for key, _ in stock.named_children()]:
        if key.startswith("norm"):
            setattr(stock, key, nn.RMSNorm(E, eps=1e-5, dtype=torch.float64))
    for p in ours.parameters():
        nn.init.normal_(p)
    stock.load_state_dict(ours.state_dict())
    inputs = [sequence()] + [sequence()] * ("Decoder" in name)
    torch.testing.assert_close(ours(*inputs), stock(*inputs))


EVERYTHING = {"norm": "rms_norm", "num_kv_heads": 1, "window": (4, 0), "alibi": True, "rotary": tx.RotaryEmbedding()}
FORMS = [{}, {"norm_first": True}, EVERYTHING, {"rotary": tx.RotaryEmbedding(dim=2)}]
STEPS = [[1] * T, [T], [3, 1, 1, 2], [1, 6]]


@pytest.mark.parametrize("options", FORMS, ids=["post-norm", "pre-norm", "everything", "rotary"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padding", [None, PADDING, LEFT_PADDING], ids=["full", "right", "left"])
def test_decoding_step_by_step(options, batch_first, padding):
    model = tx.Transformer(E, H, 1, 2, FF, 0.0, batch_first=batch_first, causal=True, dtype=torch.float64, **options)
    src, tgt = sequence(batch_first=batch_first), sequence(T, batch_first)
    own = None if padding is None else torch.cat([torch.zeros(N, 2, dtype=torch.bool), padding], 1).roll(-2, 1)
    memory = model.encoder(src, src_key_padding_mask=padding)
    masks = {"memory_key_padding_mask": padding}
    full = model.decoder(tgt, memory, tgt_key_padding_mask=own, **masks)
    at = 1 if batch_first else 0
    for steps in STEPS:
        cache, outs, done = tx.KeyValueCache(max_length=2), [], 0
        for step in steps:
            seen = None if own is None else own[:, : done + step]
            with torch.no_grad():
                part = tgt.narrow(at, done, step)
                outs.append(model.decoder(part, memory, tgt_key_padding_mask=seen, **masks, cache=cache))
            done += step
            assert cache.length == done
        torch.testing.assert_close(torch.cat(outs, at), full)
        assert len(cache.layers) == 2 and repr(cache) == f"KeyValueCache(length={T}, layers=2)"


def test_decoding_with_the_encoder_alone():
    layer = tx.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True, causal=True, **EVERYTHING)
    model = tx.TransformerEncoder(layer, 3)
    x, cache = torch.randn(2, T, E), tx.KeyValueCache()
    with torch.no_grad():
        outs = [model(x[:, n : n + 1], cache=cache) for n in range(T)]
    torch.testing.assert_close(torch.cat(outs, 1), model(x))
    one = tx.KeyValueCache()
    with torch.no_grad():
        outs = [model(x[0, n : n + 1], cache=one) for n in range(T)]
    torch.testing.assert_close(torch.cat(outs), model(x)[0])


def test_decoding_with_masks():
    """A mask of a step has one column for every position so far; self-attention is causal without being told."""
    model = tx.TransformerDecoder(tx.TransformerDecoderLayer(E, H, FF, 0.0, batch_first=True), 2)
    x, memory, mask = torch.randn(2, T, E), torch.randn(2, S, E), attention_mask("bool", T, T)
    causal = torch.ones(T, T, dtype=torch.bool).triu(1)
    full = model(x, memory, mask | causal)
    cache = tx.KeyValueCache()
    with torch.no_grad():
        outs = [model(x[:, a:b], memory, mask[a:b, :b], cache=cache) for a, b in ((0, 3), (3, 4), (4, T))]
        torch.testing.assert_close(torch.cat(outs, 1), full)
        with pytest.raises(RuntimeError, match="The shape of the 2D attn_mask"):
            model(x[:, :1], memory, mask[:1, :1], cache=cache)


def test_decoding_with_causal_hints():
    """With a cache the rows of a mask are not the first ones, so that the hint says nothing about them."""
    model = tx.TransformerDecoder(tx.TransformerDecoderLayer(E, H, FF, 0.0, batch_first=True), 1)
    x, memory = torch.randn(2, S, E), torch.randn(2, S, E)
    mask = attention_mask("causal bool")
    hints = {"tgt_is_causal": True, "memory_is_causal": True}
    full, cache = model(x, memory, mask, mask, **hints), tx.KeyValueCache()
    with torch.no_grad():
        outs = [
            model(x[:, a:b], memory, mask[a:b, :b], mask[a:b], **hints, cache=cache)
            for a, b in ((0, 2), (2, 3), (3, S))
        ]
    torch.testing.assert_close(torch.cat(outs, 1), full)


def test_beams_and_going_back():
    model = tx.TransformerDecoder(tx.TransformerDecoderLayer(E, H, FF, 0.0, batch_first=True), 2).eval()
    x, memory = torch.randn(3, T, E), torch.randn(3, S, E)
    order = torch.tensor([2, 0, 0, 1])
    cache = tx.KeyValueCache()
    with torch.no_grad():
        model(x[:, :4], memory, cache=cache)
        cache.reorder(order)
        out = model(x[order, 4:5], memory[order], cache=cache)
        expected = model(x[order, :5], memory[order], tgt_mask=attention_mask("causal bool", 5, 5))[:, 4:]
        torch.testing.assert_close(out, expected)
        cache.crop(4)
        torch.testing.assert_close(model(x[order, 4:5], memory[order], cache=cache), expected)
        assert copy.deepcopy(cache).length == 5


def test_cache_errors():
    model = tx.TransformerDecoder(tx.TransformerDecoderLayer(E, H, FF, 0.0, batch_first=True), 1)
    x, memory, cache = torch.randn(2, 1, E), torch.randn(2, S, E), tx.KeyValueCache()
    with pytest.raises(RuntimeError, match=r"cache: expected decoding under torch\.no_grad"):
        model(x, memory, cache=cache)
    with torch.no_grad():
        cache = tx.KeyValueCache()
        model(x, memory, cache=cache)
        with pytest.raises(ValueError, match="cache: expected batch 2"):
            model(x[:1], memory[:1], cache=cache)
        with pytest.raises(ValueError, match="cache: expected keys of length 5 as in the first step, got 4"):
            model(x, memory[:, :4], cache=cache)
        with pytest.raises(ValueError, match="cache: expected None with add_bias_kv"):
            cache = tx.modules.cache.AttentionCache()
            tx.MultiheadAttention(E, H, add_bias_kv=True)(x, x, x, cache=cache)
    with pytest.raises(ValueError, match="length: expected 0 to 0"):
        tx.KeyValueCache().crop(1)
    with pytest.raises(ValueError, match="max_length: expected an int above 0, got 0"):
        tx.KeyValueCache(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 2, got 3"),
        ({"num_kv_heads": 0}, "num_kv_heads: expected a divisor"),
        ({"window": (1, -2)}, "window: expected -1"),
        ({"window": 3}, "window: expected"),
        ({"rotary": tx.RotaryEmbedding(dim=6)}, "rotary: expected an even dim up to the head dimension 4, got 6"),
        ({"rotary": tx.RotaryEmbedding(dim=3)}, "rotary: expected an even dim"),
        ({"add_bias_kv": True, "causal": True}, "add_bias_kv, add_zero_attn: expected False with"),
    ],
)  # fmt: skip
def test_option_errors(options, message):
    with pytest.raises(ValueError, match=message):
        attention(**options)
