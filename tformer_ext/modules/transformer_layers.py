"""torch.nn.TransformerEncoderLayer and torch.nn.TransformerDecoderLayer on the fused operations."""

import torch
from torch import nn
from torch.nn.modules.transformer import _get_activation_fn

from .dropout import add_dropout
from .linear import call_linear, is_plain_linear, linear
from .masks import check_type
from .multihead_attention import MultiheadAttention
from .plain import is_plain
from .residual_norm import add_norm

NORMS = ("layer_norm", "rms_norm")


def make_norm(norm, d_model, eps, bias, **factory):
    """The norm of that name; RMSNorm has no bias."""
    if norm not in NORMS:
        raise ValueError(f"norm: expected {' or '.join(map(repr, NORMS))}, got {norm!r}")
    if norm == "rms_norm":
        return nn.RMSNorm(d_model, eps=eps, **factory)
    return nn.LayerNorm(d_model, eps=eps, bias=bias, **factory)


class _Layer:
    """What encoder and decoder layers share: construction, and sub-blocks joined to the residual in one operation."""

    def _build(
        self, attentions, d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first,
        bias, device, dtype, norm, num_kv_heads, of_self_attention,
    ):  # fmt: skip
        """Submodules in torch.nn's order, which is that of the state_dict and of the random numbers."""
        factory = {"device": device, "dtype": dtype}
        for name in attentions:
            options = of_self_attention if name == "self_attn" else {}
            attention = MultiheadAttention(
                d_model, nhead, dropout=dropout, bias=bias, batch_first=batch_first, num_kv_heads=num_kv_heads,
                **factory, **options,
            )  # fmt: skip
            setattr(self, name, attention)
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **factory)
        self.norm_first = norm_first
        blocks = range(1, len(attentions) + 2)
        for n in blocks:
            setattr(self, f"norm{n}", make_norm(norm, d_model, layer_norm_eps, bias, **factory))
        for n in blocks:
            setattr(self, f"dropout{n}", nn.Dropout(dropout))
        self.activation = _get_activation_fn(activation) if isinstance(activation, str) else activation

    def _attend(self, block, dropout, x, memory, attn_mask, key_padding_mask, is_causal, cache):
        """(attention of x to memory, dropout still to be applied). A subclass may have its own `block` for it."""
        if self._overrides(block):
            if cache is not None:
                raise ValueError(f"cache: expected None with a {block} of {type(self).__name__}, which knows no cache")
            inputs = (x,) if block == "_sa_block" else (x, memory)
            return getattr(self, block)(*inputs, attn_mask, key_padding_mask, is_causal=is_causal), None
        attention = self.self_attn if block == "_sa_block" else self.multihead_attn
        more = {} if cache is None else {"cache": cache}
        out = attention(
            x, memory, memory, attn_mask=attn_mask, key_padding_mask=key_padding_mask, need_weights=False,
            is_causal=is_causal, **more,
        )[0]  # fmt: skip
        return out, dropout

    def _feed_forward(self, dropout, x):
        """(result of the feed-forward block, dropout still to be applied)."""
        if self._overrides("_ff_block"):
            return self._ff_block(x), None
        activation = self._known_activation()
        if activation is not None and is_plain_linear(self.linear1):
            hidden = linear(x, self.linear1.weight, self.linear1.bias, activation)
        else:
            hidden = self.activation(self.linear1(x))
        return call_linear(self.linear2, add_dropout(hidden, self.dropout)), dropout

    def _known_activation(self):
        """The name that `linear` has for it, if any."""
        f = self.activation
        if f is nn.functional.relu or is_plain(f, nn.ReLU):
            return "relu"
        if f is nn.functional.gelu or (is_plain(f, nn.GELU) and f.approximate == "none"):
            return "gelu"
        return None

    def _overrides(self, block):
        """Whether a subclass or the object itself has a `block` other than torch's."""
        return block in self.__dict__ or getattr(type(self), block) is not getattr(self._torch, block)


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: same constructor, parameters, initial weights and forward.

    Differences: a query that may attend to nothing gets zeros from the attention, never NaN; train and eval take one
    path, which calls every submodule that has a hook or was replaced, and `_sa_block` and `_ff_block` where a subclass
    has its own; is_causal without a mask is an error in eval too.

    Beyond torch.nn; the defaults change nothing:

    Args:
        norm: "layer_norm" or "rms_norm".
        num_kv_heads, causal, window, alibi, rotary: of the self-attention, see MultiheadAttention.
    """

    _torch = nn.TransformerEncoderLayer

    def __init__(
        self,
        d_model,
        nhead,
        dim_feedforward=2048,
        dropout=0.1,
        activation=nn.functional.relu,
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
        nn.Module.__init__(self)
        of_self_attention = {"causal": causal, "window": window, "alibi": alibi, "rotary": rotary}
        self._build(
            ("self_attn",), d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype, norm, num_kv_heads, of_self_attention,
        )  # fmt: skip
        is_gelu = self.activation is nn.functional.gelu or isinstance(self.activation, nn.GELU)
        is_relu = self.activation is nn.functional.relu or isinstance(self.activation, nn.ReLU)
        self.activation_relu_or_gelu = 1 if is_relu else 2 if is_gelu else 0  # read by torch.nn.TransformerEncoder

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False, *, cache=None):
        """See torch.nn.TransformerEncoderLayer.forward. cache: a LayerCache, see KeyValueCache."""
        if src.is_nested:
            return self._forward_nested(src, src_mask, src_key_padding_mask)
        check_type("src_key_padding_mask", src_key_padding_mask)
        check_type("src_mask", src_mask)
        first = add_norm(src, None, None, self.norm1) if self.norm_first else src
        own = cache if cache is None else cache.self_attention
        attended = self._attend(
            "_sa_block", self.dropout1, first, first, src_mask, src_key_padding_mask, is_causal, own
        )
        if not self.norm_first:
            x = add_norm(*attended, src, self.norm1)
            return add_norm(*self._feed_forward(self.dropout2, x), x, self.norm2)
        y, x = add_norm(*attended, src, self.norm2, keep=True)
        y, dropout = self._feed_forward(self.dropout2, y)
        return add_dropout(y, dropout, x)

    def _forward_nested(self, src, src_mask, src_key_padding_mask):
        """As torch.nn's fast path takes nested tensors, which torch.nn.TransformerEncoder makes of padded ones."""
        if src_mask is not None or src_key_padding_mask is not None or not self.self_attn.batch_first:
            raise ValueError("src: expected no masks, and batch_first=True, with a nested tensor")
        lengths = src._nested_tensor_size()[:, 0]
        padded = src.to_padded_tensor(0.0)
        hidden = torch.arange(padded.shape[1]) >= lengths.unsqueeze(1)
        hidden = hidden.to(padded.device)
        return torch._nested_tensor_from_mask(self.forward(padded, None, hidden), ~hidden, mask_check=False)


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer: same constructor, parameters, initial weights and forward.

    For the differences and what is beyond torch.nn see TransformerEncoderLayer; num_kv_heads holds for the attention to
    memory as well.
    """

    _torch = nn.TransformerDecoderLayer

    def __init__(
        self,
        d_model,
        nhead,
        dim_feedforward=2048,
        dropout=0.1,
        activation=nn.functional.relu,
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
        nn.Module.__init__(self)
        of_self_attention = {"causal": causal, "window": window, "alibi": alibi, "rotary": rotary}
        self._build(
            ("self_attn", "multihead_attn"), d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps,
            batch_first, norm_first, bias, device, dtype, norm, num_kv_heads, of_self_attention,
        )  # fmt: skip

    def forward(
        self,
        tgt,
        memory,
        tgt_mask=None,
        memory_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        tgt_is_causal=False,
        memory_is_causal=False,
        *,
        cache=None,
    ):
        """See torch.nn.TransformerDecoderLayer.forward. cache: a LayerCache, see KeyValueCache."""
        own, crossed = (None, None) if cache is None else (cache.self_attention, cache.cross_attention)

        def attend(y):
            return self._attend("_sa_block", self.dropout1, y, y, tgt_mask, tgt_key_padding_mask, tgt_is_causal, own)

        def look_up(y):
            masks = (memory_mask, memory_key_padding_mask, memory_is_causal)
            return self._attend("_mha_block", self.dropout2, y, memory, *masks, crossed)

        if not self.norm_first:
            x = add_norm(*attend(tgt), tgt, self.norm1)
            x = add_norm(*look_up(x), x, self.norm2)
            return add_norm(*self._feed_forward(self.dropout3, x), x, self.norm3)
        y, x = add_norm(*attend(add_norm(tgt, None, None, self.norm1)), tgt, self.norm2, keep=True)
        y, x = add_norm(*look_up(y), x, self.norm3, keep=True)
        y, dropout = self._feed_forward(self.dropout3, y)
        return add_dropout(y, dropout, x)
