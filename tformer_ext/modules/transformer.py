"""torch.nn.TransformerEncoder, torch.nn.TransformerDecoder and torch.nn.Transformer on the fused operations."""

from torch import nn

from .masks import check_type, is_causal_mask
from .transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer, make_norm


def _is_causal(mask, is_causal):
    """torch's hint for the layers: what was said, else whether mask turns out to be the causal one."""
    return is_causal_mask(mask) if is_causal is None else bool(is_causal)


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder: same constructor, state_dict and forward.

    Differences: it never makes nested tensors, so padded positions come out as the layers leave them, in train and eval
    alike, and masks reach the layers as they were given.
    """

    def __init__(self, encoder_layer, num_layers, norm=None, enable_nested_tensor=True, mask_check=True):
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor  # as it was asked for; use_nested_tensor says what is done

    def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None, *, cache=None):
        """See torch.nn.TransformerEncoder.forward. cache: a KeyValueCache, for stacks that generate."""
        check_type("src_key_padding_mask", src_key_padding_mask)
        check_type("mask", mask)
        is_causal = _is_causal(mask, is_causal)
        output = src
        for n, layer in enumerate(self.layers):
            more = {} if cache is None else {"cache": cache.layer(n)}
            output = layer(
                output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask, **more
            )
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(nn.TransformerDecoder):
    """torch.nn.TransformerDecoder: same constructor, state_dict and forward, and incremental decoding with a cache."""

    def forward(
        self,
        tgt,
        memory,
        tgt_mask=None,
        memory_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        tgt_is_causal=None,
        memory_is_causal=False,
        *,
        cache=None,
    ):
        """See torch.nn.TransformerDecoder.forward. cache: a KeyValueCache; tgt then has the next positions only."""
        tgt_is_causal = _is_causal(tgt_mask, tgt_is_causal)
        output = tgt
        for n, layer in enumerate(self.layers):
            more = {} if cache is None else {"cache": cache.layer(n)}
            output = layer(
                output, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal, **more,
            )  # fmt: skip
        return output if self.norm is None else self.norm(output)


class Transformer(nn.Transformer):
    """torch.nn.Transformer: same constructor, state_dict, initial weights and forward.

    Beyond torch.nn; the defaults change nothing. To generate, call `encoder` once, then `decoder` with a KeyValueCache.

    Args:
        norm, num_kv_heads, rotary, alibi: of all layers, see TransformerEncoderLayer and MultiheadAttention.
        window: of the self-attention of the decoder and the encoder.
        causal: of the self-attention of the decoder: no tgt_mask is needed.
    """

    def __init__(
        self,
        d_model=512,
        nhead=8,
        num_encoder_layers=6,
        num_decoder_layers=6,
        dim_feedforward=2048,
        dropout=0.1,
        activation=nn.functional.relu,
        custom_encoder=None,
        custom_decoder=None,
        layer_norm_eps=1e-5,
        batch_first=False,
        norm_first=False,
        bias=True,
        device=None,
        dtype=None,
        *,
        norm="layer_norm",
        num_kv_heads=None,
        causal=False,
        window=None,
        alibi=False,
        rotary=None,
    ):
        factory = {"device": device, "dtype": dtype}
        arguments = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
        )  # fmt: skip
        options = {"norm": norm, "num_kv_heads": num_kv_heads, "window": window, "alibi": alibi, "rotary": rotary}
        if custom_encoder is None:
            layer = TransformerEncoderLayer(*arguments, **factory, **options)
            last = make_norm(norm, d_model, layer_norm_eps, bias, **factory)
            custom_encoder = TransformerEncoder(layer, num_encoder_layers, last)
        if custom_decoder is None:
            layer = TransformerDecoderLayer(*arguments, **factory, **options, causal=causal)
            last = make_norm(norm, d_model, layer_norm_eps, bias, **factory)
            custom_decoder = TransformerDecoder(layer, num_decoder_layers, last)
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )
