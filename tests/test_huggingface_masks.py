"""The masks that transformers asks for reach the kernels as causal, window, key lengths and padding, never as L x S."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from hf_models import DECODERS, ENCODERS, SEQ2SEQS, UNUSUAL, build, first_output, tokens  # noqa: E402
from transformers import masking_utils  # noqa: E402

import tformer_ext as tx  # noqa: E402
from tformer_ext import functional as F  # noqa: E402
from tformer_ext.huggingface.masks import (  # noqa: E402
    EVERYWHERE,
    Pattern,
    PositionMask,
    attention_mask,
    knowledge_of,
    pattern_of,
)

FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "everywhere": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(4),
    "wide window": masking_utils.sliding_window_causal_mask_function(40),
    "both sides": masking_utils.sliding_window_bidirectional_mask_function(3),
}
SIZES = {"window": 4, "wide window": 40, "both sides": 3}
# L, S, q_offset, kv_offset: first call; growing cache; static cache, empty and begun; a window's cache; a single query
PLACES = [(12, 12, 0, 0), (5, 12, 7, 0), (12, 20, 0, 0), (5, 20, 7, 0), (5, 8, 10, 7), (1, 12, 11, 0), (9, 6, 0, 0)]


class Module:
    def __init__(self, is_causal):
        self.is_causal = is_causal


def padding_of(kind, length):
    kept = torch.ones(3, length, dtype=torch.bool)
    for row, hidden in enumerate((0, length // 3, length // 2)):
        if kind == "left":
            kept[row, :hidden] = False
        if kind == "right":
            kept[row, length - hidden :] = False
        if kind == "holes":
            kept[row, 1 : 1 + hidden] = False
    return kept


@pytest.fixture(scope="module", autouse=True)
def registered():
    tx.huggingface.register()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("padding", [None, "none", "left", "right", "holes"])
def test_same_attention_as_with_transformers_own_mask(function, place, padding):
    L, S, q_offset, kv_offset = place
    causal = FUNCTIONS[function] in (FUNCTIONS["causal"], FUNCTIONS["window"], FUNCTIONS["wide window"])
    arguments = {
        "batch_size": 3, "q_length": L, "kv_length": S, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": FUNCTIONS[function], "local_size": SIZES.get(function), "device": torch.device("cpu"),
        "attention_mask": None if padding is None else padding_of(padding, max(q_offset + L, S if not causal else 0)),
    }  # fmt: skip
    skip = {"allow_is_causal_skip": causal, "allow_is_bidirectional_skip": not causal}
    mask = attention_mask(**arguments, **skip)
    dense = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    q, k, v = torch.randn(3, 2, L, 8), torch.randn(3, 2, S, 8), torch.randn(3, 2, S, 8)
    bias = torch.randn(1, 2, L, S)
    out, _ = tx.huggingface.attention_forward(Module(causal), q, k, v, mask, position_bias=bias)
    torch.testing.assert_close(out.transpose(1, 2), F.attention(q, k, v, mask=dense, bias=bias))
    if mask is not None:
        assert mask.shape == dense.shape and torch.equal(mask & True, dense)


def test_patterns():
    assert pattern_of(FUNCTIONS["causal"]) == Pattern(True)
    assert pattern_of(FUNCTIONS["everywhere"]) == EVERYWHERE
    assert pattern_of(FUNCTIONS["window"]) == Pattern(True, 3)
    assert pattern_of(FUNCTIONS["both sides"]) == Pattern(False, 3, 3)
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    packed = masking_utils.packed_sequence_mask_function(torch.zeros(1, 4))
    for unknown in (chunked, packed, masking_utils.and_masks(FUNCTIONS["causal"], packed), lambda b, h, q, k: q >= k):
        assert pattern_of(unknown) is None


def test_unknown_patterns_keep_their_elements():
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64))
    mask = attention_mask(2, 8, 8, mask_function=chunked, local_size=4, device="cpu")
    expected = masking_utils.sdpa_mask(2, 8, 8, mask_function=chunked, local_size=4, device="cpu")
    assert type(mask) is torch.Tensor and torch.equal(mask, expected)


def position_mask():
    return attention_mask(2, 6, 6, mask_function=FUNCTIONS["window"], attention_mask=torch.ones(2, 6).bool())


def test_operations_see_the_elements():
    mask = position_mask()
    elements = torch.ones(6, 6).tril().triu(-3).bool().expand(2, 1, 6, 6)
    assert type(mask) is PositionMask and mask.dtype == torch.bool and mask.shape == (2, 1, 6, 6)
    for operation in (lambda m: m[..., :4], lambda m: ~m, lambda m: m.float(), lambda m: torch.where(m, 1.0, -1.0)):
        assert torch.equal(operation(mask), operation(elements))
        assert type(operation(mask)) is torch.Tensor
    assert "window" in repr(mask)


def test_inference_mode():
    model, batch = build("Mistral", *DECODERS["Mistral"], "tformer_ext"), tokens("left")
    expected = model(**batch).logits
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch).logits, expected)


def test_a_change_in_place_counts():
    mask = position_mask()
    assert mask.masked_fill_(torch.tensor([True] + [False] * 5), False) is mask
    q = torch.randn(2, 2, 6, 8)
    out, _ = tx.huggingface.attention_forward(Module(True), q, q, q, mask)
    expected = torch.ones(6, 6).tril().triu(-3).bool()
    expected[:, 0] = False
    torch.testing.assert_close(out.transpose(1, 2), F.attention(q, q, q, mask=expected))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["Bert", "ModernBert", "GPT2", "Llama", "Mistral", "Gemma2", "GptOss", "T5", "Bart"])
def test_no_model_hands_over_a_matrix(name, side, monkeypatch):
    seen = []

    def watched(query, key, value, **options):
        seen.append(options)
        return attention(query, key, value, **options)

    attention = F.attention
    monkeypatch.setattr(F, "attention", watched)
    family = next(f for f in (ENCODERS, DECODERS, SEQ2SEQS) if name in f)
    batch = tokens(side)
    more = {"decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
    build(name, *family[name], "tformer_ext")(**batch, **(more if family is SEQ2SEQS else {}))
    assert len(seen) >= 2 and {"key_lengths", "mask"} & set().union(*seen)
    for options in seen:
        mask = options.get("mask")
        assert mask is None or mask.shape[2] == 1 or mask.stride(2) == 0
        assert not (side == "right" and "causal" in options and "key_lengths" not in options)
    windows = {options["window"] for options in seen if "window" in options}
    assert windows == {"ModernBert": {(4, 4)}}.get(name, {(5, -1)} if "sliding_window" in family[name][1] else set())


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("side", [None, "left"])
def test_single_queries_have_ordinary_masks(length, side):
    """What decoding compiles may not depend on a number that grows with every token."""
    model = build("Llama", *DECODERS["Llama"], "tformer_ext")
    batch = tokens(side, length=9)
    ids = batch["input_ids"][:, :length]
    mask = masking_utils.create_causal_mask(
        model.config, model.get_input_embeddings()(ids), batch["attention_mask"][:, :length], None
    )
    assert (mask is None) if side is None else mask.dim() == 4
    assert type(mask) is (PositionMask if side and length > 1 else torch.Tensor if side else type(None))


@pytest.mark.slow
@pytest.mark.parametrize("name, family", [("Bert", ENCODERS), ("Mistral", DECODERS), ("Bloom", UNUSUAL)])
def test_compiled_as_a_whole(name, family):
    model, batch = build(name, *family[name], "tformer_ext"), tokens("left")
    kept = batch["attention_mask"].bool()
    expected = first_output(model(**batch))[kept]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = first_output(compiled(**batch))[kept]
    torch.testing.assert_close(actual, expected)
    gradients = []
    for output in (expected, actual):
        model.zero_grad()
        output.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None and p.grad.any()])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
def test_compiled_by_the_layer():
    """The mask, made outside, is an argument of what is compiled."""
    model, batch = build("Mistral", *DECODERS["Mistral"], "tformer_ext"), tokens("left")
    kept = batch["attention_mask"].bool()
    expected = model(**batch).logits[kept]
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(**batch).logits[kept], expected)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model, batch = build("Mistral", *DECODERS["Mistral"], "tformer_ext"), tokens("right")
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train().zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_what_models_know_of_masks():
    for name, expected in {"Bert": (True, True), "Gemma2": (True, False), "Bloom": (False, False)}.items():
        assert getattr(transformers, f"{name}Model")  # its code is there
        assert knowledge_of(getattr(transformers, f"{name}Config")()) == expected, name
    assert (
        knowledge_of(None) == knowledge_of(type("Config", (), {"__module__": "none.configuration_x"})()) == (True, True)
    )
    assert knowledge_of(type("Config", (), {"__module__": "math"})()) == (True, True)  # code without models
