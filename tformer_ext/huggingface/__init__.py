"""Hugging Face transformers: after register(), attn_implementation="tformer_ext" runs models on the fused attention.

import tformer_ext as tx
tx.huggingface.register()
model = AutoModel.from_pretrained(path, attn_implementation="tformer_ext")   # or
model.set_attn_implementation("tformer_ext")
"""

import torch

from .. import functional as F
from .masks import PositionMask, attention_mask

NAME = "tformer_ext"

# Keywords that models pass along and that attention itself has no use for.
_NO_EFFECT = frozenset({
    "cache_position", "deterministic", "layer_head_mask_is_none", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "past_key_value", "past_key_values", "position_embeddings", "position_ids",
    "position_embeddings_global", "position_embeddings_local", "return_dict", "use_cache", "logits_to_keep",
    "token_type_ids", "input_ids", "labels", "mm_token_type_ids",
})  # fmt: skip


def register():
    """Registers the attention and its masks with transformers (5 or newer) as "tformer_ext". Calling it again is fine.

    Raises ImportError where transformers is missing or too old.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "tformer_ext.huggingface needs transformers 5 or newer: pip install 'transformers>=5,<6'"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    softcap=None,
    s_aux=None,
    sinks=None,
    sliding_window=None,
    position_bias=None,
    indices=None,
    **kwargs,
):
    """transformers' attention function: query (B, Hq, L, D), key and value (B, Hk, S, D), grouped heads unrepeated.

    attention_mask: bool (B, 1 or H, L, S), True = attend, floating (added), or None. softcap (Gemma 2), s_aux (sink
    logits (Hq), GPT-OSS), sinks (sink logits (B, Hq, L, 1), Inkling 2), position_bias (T5), indices (keys chosen for
    each query, (B, L, number), DeepSeek V3.2) and sliding_window are honoured. Returns ((B, L, Hq, Dv), None).
    What cannot be honoured raises NotImplementedError; nothing that would change a number is passed over.
    """
    _refuse_unknown(kwargs)
    L, S = query.shape[2], key.shape[2]
    if sinks is not None and sinks.shape != (*query.shape[:3], 1):
        raise NotImplementedError(
            f"sinks: expected {(*query.shape[:3], 1)}, one of each query, got {tuple(sinks.shape)}"
        )
    if query.shape[0] != key.shape[0] and query.shape[0] == 1:  # learned queries, one for all
        query = query.expand(key.shape[0], -1, -1, -1)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options = {"bias": position_bias}
    if isinstance(attention_mask, PositionMask):
        if attention_mask.options is not None and attention_mask.shape == (query.shape[0], 1, L, S):
            options |= attention_mask.options
            S = attention_mask.keys
        else:
            options["mask"] = attention_mask.elements()[..., :S]
    elif attention_mask is not None:
        attention_mask = attention_mask[..., :S]
        if attention_mask.dtype == torch.bool:
            options["mask"] = attention_mask
        else:
            options["bias"] = attention_mask if position_bias is None else attention_mask + position_bias[..., :S]
    elif is_causal and L > 1:  # one query is the newest and sees all
        options["causal"] = "upper_left"
    if attention_mask is None and is_causal and sliding_window is not None:
        options["window"] = (int(sliding_window) - 1, 0)
    if indices is not None:
        chosen = torch.zeros((query.shape[0], 1, L, key.shape[2]), dtype=torch.bool, device=query.device)
        chosen = chosen.scatter_(-1, indices.long().unsqueeze(1), True)[..., :S]
        options["mask"] = chosen & options["mask"] if "mask" in options else chosen
    if options["bias"] is not None:
        options["bias"] = options["bias"][..., :S]
    out = F.attention(
        query,
        key if key.shape[2] == S else key[:, :, :S],
        value if value.shape[2] == S else value[:, :, :S],
        sinks=s_aux,
        scale=scaling,
        softcap=0.0 if softcap is None else float(softcap),
        dropout_p=float(dropout or 0.0),
        return_lse=sinks is not None,
        **options,
    )
    if sinks is not None:  # one more term e^sink of the softmax's denominator e^lse, for each query its own
        out, lse = out
        out = out * torch.sigmoid(lse.unsqueeze(-1) - sinks).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _refuse_unknown(kwargs):
    for name, value in kwargs.items():
        if name in _NO_EFFECT or value is None or value is False:
            continue
        if name == "output_attentions":
            raise NotImplementedError(
                'output_attentions: the fused attention never holds the weights; use attn_implementation="eager"'
            )
        if name == "cache":
            raise NotImplementedError("cache: paged caches (continuous batching) are not supported by tformer_ext")
        if isinstance(value, torch.Tensor) or name.startswith(("cu_seq", "max_length", "max_seq", "block_")):
            raise NotImplementedError(f"{name}: tformer_ext does not know this argument and will not ignore it")
