"""transformers models with attn_implementation="tformer_ext" against eager: logits, gradients, generation."""

import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

import transformers_sweep  # noqa: E402
from hf_models import (  # noqa: E402
    CLIP,
    DECODERS,
    ENCODERS,
    SEQ2SEQS,
    UNUSUAL,
    UNUSUAL_SEQ2SEQS,
    VISION,
    WHISPER,
    build,
    first_output,
    pair,
    tokens,
)

import tformer_ext as tx  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def registered():
    tx.huggingface.register()
    tx.huggingface.register()  # twice is fine


def assert_gradients_agree(models):
    some = False
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5 + 1e-4 * a.grad.abs().max(), msg=name)
            some = some or bool(a.grad.abs().max() > 0)
    assert some


def assert_agree(models, batch, kept, **more):
    eager, ours = (first_output(m(**batch, **more))[kept.bool()] for m in models)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=2e-5)
    for model, output in zip(models, (eager, ours), strict=True):
        model.zero_grad()
        output.square().mean().backward()
    assert_gradients_agree(models)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_encoders(name, side):
    batch = tokens(side)
    assert_agree(pair(name, *ENCODERS[name]), batch, batch["attention_mask"])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_decoders(name, side):
    batch = tokens(side)
    assert_agree(pair(name, *DECODERS[name]), batch, batch["attention_mask"])


@pytest.mark.parametrize("name", SEQ2SEQS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_encoder_decoders(name, side):
    batch = tokens(side)
    labels = torch.randint(3, 99, (3, 6))
    assert_agree(pair(name, *SEQ2SEQS[name]), batch, torch.ones(3, 6), decoder_input_ids=labels)


@pytest.mark.parametrize("name", [*UNUSUAL, *UNUSUAL_SEQ2SEQS])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_models_with_unusual_attention(name, side):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip("this version of transformers has no such model")
    batch, more = tokens(side), {}
    models = pair(name, *(UNUSUAL | UNUSUAL_SEQ2SEQS)[name])
    kept = batch["attention_mask"].bool()
    if name in UNUSUAL_SEQ2SEQS:
        more["decoder_input_ids"], kept = torch.randint(3, 99, (3, 6)), torch.ones(3, 6).bool()
    with torch.no_grad():
        eager, ours = (first_output(m(**batch, **more))[kept] for m in models)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=2e-5 * max(1.0, eager.abs().max().item()))


def test_vision():
    models = pair("ViT", "ViTModel", VISION)
    assert_agree(models, {"pixel_values": torch.randn(2, 3, 16, 16)}, torch.ones(2, 17))


@pytest.mark.parametrize("side", [None, "right"])
def test_vision_and_text(side):
    models, batch = pair("CLIP", *CLIP), tokens(side) | {"pixel_values": torch.randn(2, 3, 16, 16)}
    batch["input_ids"][:, 9] = 2  # the end, where the text is pooled; before all padding but of the last row
    batch["attention_mask"][:, :10] = 1
    eager, ours = (m(**batch, return_loss=False).logits_per_image for m in models)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=2e-5)
    eager.square().mean().backward()
    ours.square().mean().backward()
    assert_gradients_agree(models)


def test_speech():
    features, words = torch.randn(2, 8, 20), torch.randint(3, 99, (2, 6))
    models = pair("Whisper", *WHISPER)
    assert_agree(models, {"input_features": features}, torch.ones(2, 6), decoder_input_ids=words)
    options = {"max_new_tokens": 8, "do_sample": False, "language": None, "task": None}
    eager, ours = (m.generate(input_features=features, **options) for m in models)
    assert torch.equal(eager, ours)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation(name, cache):
    batch = tokens("left", length=9)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    eager, ours = (m.generate(**batch, **options, disable_compile=True) for m in pair(name, *DECODERS[name]))
    assert torch.equal(eager, ours)


@pytest.mark.parametrize("name", SEQ2SEQS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_of_encoder_decoders(name, cache):
    batch = tokens("right", length=9)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    eager, ours = (m.generate(**batch, **options) for m in pair(name, *SEQ2SEQS[name]))
    assert torch.equal(eager, ours)


@pytest.mark.parametrize("name, family", [("Llama", DECODERS), ("Bart", SEQ2SEQS)])
def test_beam_search(name, family):
    batch = tokens("left" if family is DECODERS else "right", length=9)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    eager, ours = (m.generate(**batch, **options) for m in pair(name, *family[name]))
    assert torch.equal(eager, ours)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # its new name is not in every transformers 5
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
def test_several_tokens_after_a_cache(name, cache, side):
    """Prefill in two pieces, as assisted generation and chunked prompts do it."""
    batch = tokens(side, length=12)
    results = []
    for model in pair(name, *DECODERS[name]):
        make = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}[cache]
        past = make(config=model.config, **({"max_cache_len": 20} if cache == "static" else {}))
        for piece, seen in ((slice(0, 7), 7), (slice(7, 12), 12)):
            ids, mask = batch["input_ids"][:, piece], batch["attention_mask"][:, :seen]
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, past_key_values=past).logits
        results.append(logits[batch["attention_mask"][:, piece].bool()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name, family", [("Bert", ENCODERS), ("Mistral", DECODERS), ("T5", SEQ2SEQS)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes(name, family, dtype):
    """Not farther from the float32 model than twice what eager in that dtype is."""
    batch = tokens("right")
    more = {"decoder_input_ids": torch.randint(3, 99, (3, 6))} if family is SEQ2SEQS else {}
    kept = torch.ones(3, 6).bool() if more else batch["attention_mask"].bool()
    exact = first_output(build(name, *family[name], "eager")(**batch, **more))[kept]
    eager, ours = (first_output(m.to(dtype)(**batch, **more))[kept] for m in pair(name, *family[name]))
    assert ours.dtype == dtype
    error, allowed = ((t.float() - exact).norm().item() for t in (ours, eager))
    assert error <= 2 * allowed


def test_dropout_in_training():
    _, model = pair("Bert", *ENCODERS["Bert"])
    model.train()
    batch = tokens(None)
    torch.manual_seed(1)
    first = model(**batch).last_hidden_state
    torch.manual_seed(1)
    assert torch.equal(model(**batch).last_hidden_state, first)
    assert not torch.equal(model(**batch).last_hidden_state, first)


def test_switching_a_loaded_model():
    eager, _ = pair("Bert", *ENCODERS["Bert"])
    batch = tokens("right")
    expected = eager(**batch).last_hidden_state
    eager.set_attn_implementation("tformer_ext")
    actual = eager(**batch).last_hidden_state
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[kept], expected[kept], rtol=1e-4, atol=2e-5)


class Module:
    is_causal = True


def test_what_cannot_be_honoured_is_refused():
    q = torch.randn(1, 2, 3, 8)
    forward = tx.huggingface.attention_forward
    with pytest.raises(NotImplementedError, match="output_attentions"):
        forward(Module(), q, q, q, None, output_attentions=True)
    with pytest.raises(NotImplementedError, match="cache"):
        forward(Module(), q, q, q, None, cache=object())
    with pytest.raises(NotImplementedError, match="head_mask"):
        forward(Module(), q, q, q, None, head_mask=torch.ones(2))
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
        forward(Module(), q, q, q, None, cu_seq_lens_q=torch.tensor([0, 3]))
    forward(Module(), q, q, q, None, position_ids=torch.arange(3), use_cache=True, output_attentions=False)


@pytest.mark.parametrize("masked", [None, bool, float])
def test_sinks_of_queries_and_chosen_keys(masked):
    """Against the softmax with one more column, over the keys that are left."""
    q, k, v = (torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, 3, 6, 1, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(6)[:3] for _ in range(12)]).view(2, 6, 3)
    visible = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
    mask = {None: None, bool: visible, float: torch.where(visible, 0.0, -torch.inf).double()}[masked]
    visible = visible & torch.zeros(2, 1, 6, 6).bool().scatter(-1, indices[:, None], True)
    scores = (q @ k.mT).masked_fill(~visible, -torch.inf)
    expected = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v
    actual, _ = tx.huggingface.attention_forward(
        Module(), q, k, v, mask, scaling=1.0, sinks=sinks, indices=indices.to(torch.int32)
    )
    torch.testing.assert_close(actual, expected.transpose(1, 2))
    cotangent, leaves = torch.randn_like(actual), (q, k, v, sinks)
    golden = torch.autograd.grad(expected.transpose(1, 2), leaves, cotangent)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, cotangent), golden)
    with pytest.raises(NotImplementedError, match=r"sinks: expected \(2, 3, 6, 1\), one of each query, got \(3,\)"):
        tx.huggingface.attention_forward(Module(), q, k, v, mask, sinks=torch.zeros(3))


def test_window_without_a_mask():
    q = torch.randn(1, 2, 12, 8)
    mask = torch.ones(12, 12).tril().bool() & ~torch.ones(12, 12).tril(-4).bool()
    windowed, _ = tx.huggingface.attention_forward(Module(), q, q, q, None, sliding_window=4)
    masked, _ = tx.huggingface.attention_forward(Module(), q, q, q, mask)
    torch.testing.assert_close(windowed, masked)


@pytest.mark.slow
def test_sweep_of_models():
    command = [sys.executable, transformers_sweep.__file__, "bloom"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "2 same" in result.stdout, result.stdout + result.stderr


def test_sweep_finds_differences():
    stock = {"a": torch.ones(2, 3, 4), "past_key_values": None}
    assert transformers_sweep.compare(stock, {"a": torch.ones(2, 3, 4) + 1e-6}) is None
    changed = {"a": torch.ones(2, 3, 4)}
    changed["a"][1, 2] = 1.01
    kept = torch.tensor([[True, True, True], [True, True, False]])
    assert transformers_sweep.compare(stock, changed, kept) is None
    assert transformers_sweep.compare(stock, changed) == ".a by 1.0e-02"
    assert transformers_sweep.compare(stock, {"a": torch.full((2, 3, 4), torch.nan)}) == ".a: what is finite"
    assert transformers_sweep.compare(stock, {"b": stock["a"]}) == "outputs ['.a', '.b']"
