"""Tiny random models of transformers, with eager attention and with ours, and batches for them."""

import torch
import transformers

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
EXPERTS = {
    **SMALL,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
# With attention of their own, or written for eager attention only: masks that are added, is_causal that says nothing;
# sinks of each query; keys chosen for each query.
UNUSUAL = {
    "Bloom": ("BloomModel", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Mpt": ("MptModel", {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "MPNet": ("MPNetModel", SMALL),
    "Splinter": ("SplinterModel", SMALL),
    "GPTNeoXJapanese": ("GPTNeoXJapaneseModel", SMALL),
    "DeepseekV4": ("DeepseekV4Model", {
        **EXPERTS, "head_dim": 16, "num_key_value_heads": 1, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2,
        "sliding_window": 6, "index_n_heads": 2, "index_head_dim": 16,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "hash_moe"]}),
    "DeepseekV32": ("DeepseekV32Model", {
        **EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 5,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "Inkling2Text": ("Inkling2TextModel", {
        **EXPERTS, "num_key_value_heads": 2, "head_dim": 8, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 6, "rel_extent": 8,
        "layer_types": ["hybrid_sliding", "hybrid"]}),
}  # fmt: skip
UNUSUAL_SEQ2SEQS = {
    "NllbMoe": ("NllbMoeModel", {**SEQ2SEQ, "num_experts": 4, "expert_capacity": 64, "router_jitter_noise": 0.0}),
    "PegasusX": ("PegasusXModel", {**SEQ2SEQ, "num_global_tokens": 4, "block_size": 8}),
    "Mvp": ("MvpModel", SEQ2SEQ),
}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37,
          "image_size": 16, "patch_size": 4}  # fmt: skip
# Attention of its own for text, chosen when it is built, beside a vision model with the interface.
GIT = ("GitModel", {**SMALL, "vision_config": VISION, "num_image_with_embedding": None})
WHISPER = ("WhisperForConditionalGeneration", {
    **SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32, "begin_suppress_tokens": None,
    "suppress_tokens": None,
})  # fmt: skip
CLIP = ("CLIPModel", {"text_config": {**SMALL, "projection_dim": 16}, "vision_config": {**VISION, "projection_dim": 16},
                      "projection_dim": 16})  # fmt: skip


def build(name, model, options, implementation):
    """A random model in eval mode, its weights far from zero, so that attention matters; the same at every call."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    config._attn_implementation = implementation
    built = getattr(transformers, model)(config).eval()
    for parameter in built.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    assert built.config._attn_implementation == implementation
    return built


def pair(name, model, options):
    """The same weights with eager attention and with ours."""
    models = [build(name, model, options, implementation) for implementation in ("eager", "tformer_ext")]
    assert models[0].config is not models[1].config
    models[1].load_state_dict(models[0].state_dict())
    return models


def tokens(side, length=15):
    """input_ids and attention_mask (3, length): rows without padding, with some and with much on that side."""
    ids = torch.randint(3, 99, (3, length))
    kept = torch.ones_like(ids)
    for row, padding in enumerate((0, length // 4, length * 3 // 5)):
        if side == "right" and padding:
            kept[row, length - padding :] = 0
        if side == "left" and padding:
            kept[row, :padding] = 0
    return {"input_ids": ids.where(kept.bool(), 0), "attention_mask": kept if side else torch.ones_like(ids)}


def first_output(output):
    """Logits, or the hidden states of a model without a head."""
    return output.logits if "logits" in output else output.last_hidden_state
