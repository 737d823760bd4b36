"""torch.nn.MultiheadAttention on the fused attention."""

import warnings

import torch
from torch import nn
from torch.nn.functional import pad

from .. import functional as F
from ..arguments import window_pair
from ..reference import attention_dropout_mask
from ..reference.attention import visible_keys
from ..reference.philox import keep_scale
from .linear import call_linear, linear
from .masks import check_type, is_causal_mask, padding_operands
from .positions import alibi_slopes


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: same constructor, parameters, initial weights and forward.

    Differences, all towards what is meant: a query that may attend to nothing gets zeros (then out_proj's bias), never
    NaN, and zero weights; out_proj is called as a module, so that hooks and replacements (LoRA) take effect; with
    need_weights the output does not change, the weights are recomputed beside it.

    Beyond torch.nn, for attention from a sequence to itself unless said otherwise; the defaults change nothing:

    Args:
        num_kv_heads: heads of keys and values (also between sequences), a divisor of num_heads. The parameters are then
            in_proj_weight (embed_dim + 2 * num_kv_heads * head_dim, embed_dim), or k_proj_weight (num_kv_heads *
            head_dim, kdim) and v_proj_weight likewise, and in_proj_bias with as many elements as these have rows.
        causal: no query sees a later key; no mask is needed. With L queries and S keys the last ones are aligned.
        window: (left, right), keys that a query sees on either side of its own position, -1 = unbounded.
        alibi: subtracts from a score the distance times a slope of its head (Press et al. 2022).
        rotary: a RotaryEmbedding that is applied to queries and keys.
    """

    # also those of objects that were made before or without this constructor
    num_kv_heads = None
    causal = alibi = False
    window = rotary = None

    def __init__(
        self,
        embed_dim,
        num_heads,
        dropout=0.0,
        bias=True,
        add_bias_kv=False,
        add_zero_attn=False,
        kdim=None,
        vdim=None,
        batch_first=False,
        device=None,
        dtype=None,
        *,
        num_kv_heads=None,
        causal=False,
        window=None,
        alibi=False,
        rotary=None,
    ):
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if window is not None:
            window_pair(window)
        if rotary is not None:
            rotary.check(self.head_dim)
        if (add_bias_kv or add_zero_attn) and (causal or window or alibi or num_kv_heads):
            raise ValueError(
                "add_bias_kv, add_zero_attn: expected False with num_kv_heads, causal, window or alibi: the added keys "
                "have no position and no fewer heads"
            )
        self.causal, self.window, self.alibi, self.rotary = causal, window, alibi, rotary
        if num_kv_heads is not None and num_kv_heads != num_heads:
            self._group_heads(num_kv_heads)

    def _group_heads(self, num_kv_heads):
        """Replaces the projections of keys and values, and their biases, by smaller ones."""
        if not 0 < num_kv_heads <= self.num_heads or self.num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {self.num_heads}, got {num_kv_heads}")
        self.num_kv_heads = num_kv_heads
        E, width = self.embed_dim, num_kv_heads * self.head_dim
        if self._qkv_same_embed_dim:
            shapes = {"in_proj_weight": (E + 2 * width, E)}
        else:
            shapes = {"k_proj_weight": (width, self.kdim), "v_proj_weight": (width, self.vdim)}
        if self.in_proj_bias is not None:
            shapes["in_proj_bias"] = (E + 2 * width,)
        for name, shape in shapes.items():
            weight = nn.Parameter(getattr(self, name).new_empty(shape))
            setattr(self, name, weight)
            nn.init.zeros_(weight) if name == "in_proj_bias" else nn.init.xavier_uniform_(weight)

    def extra_repr(self):
        names = ("num_kv_heads", "causal", "window", "alibi", "rotary")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names if getattr(self, name))

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
        *,
        cache=None,
    ):
        """See torch.nn.MultiheadAttention.forward: arguments, shapes, errors and results are the same.

        cache: an AttentionCache of a KeyValueCache; keys and values of this call are added to it, and S of the masks
        counts all of it.

        Returns (output, weights): weights after dropout, (N, L, S) averaged over heads or (N, H, L, S), or None.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise TypeError(
                "query, key, value: expected strided tensors, got a nested tensor; pad it and mask the keys"
            )
        self._check_inputs(query, key, value, key_padding_mask, attn_mask, is_causal, cache)
        batched = query.dim() == 3
        batch_first = self.batch_first or not batched
        q, k, v = self._heads(query, key, value, batched, batch_first, cache)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if self.bias_k is not None or self.add_zero_attn:
            k, v, attn_mask, key_padding_mask = self._append_rows(k, v, attn_mask, key_padding_mask)
        options = self._options(q, k, attn_mask, key_padding_mask, is_causal and not need_weights, cache)
        if self.training and self.dropout:
            options["dropout_p"] = self.dropout
            options["dropout_seed"] = torch.randint(0, 2**62, (), dtype=torch.int64, device=q.device)
        weights = None
        if need_weights:
            out, lse = F.attention(q, k, v, **options, return_lse=True)
            weights = _weights(q, k, lse, **options)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.attention(q, k, v, **options)
        out = (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(-2)
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        return call_linear(self.out_proj, out), weights

    def _check_inputs(self, query, key, value, key_padding_mask, attn_mask, is_causal, cache):
        """torch's own checks (their types and messages), made before anything is computed."""
        nn.functional._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None and not self.causal and cache is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        check_type("key_padding_mask", key_padding_mask)
        check_type("attn_mask", attn_mask)
        if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
            warnings.warn(
                "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
                stacklevel=3,
            )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        same = key.shape == value.shape if self._qkv_same_embed_dim else key.shape[:-1] == value.shape[:-1]
        if not same:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        batch_first = self.batch_first or query.dim() == 2
        seq, batch = (-2, 0) if batch_first else (0, 1)
        L, S, H = query.shape[seq], key.shape[seq], self.num_heads
        N = query.shape[batch] if query.dim() == 3 else 1
        if cache is not None:
            if self.bias_k is not None or self.add_zero_attn:
                raise ValueError("cache: expected None with add_bias_kv or add_zero_attn")
            S = S if cache.fixed else S + cache.length
        if attn_mask is not None and attn_mask.dim() == 2 and attn_mask.shape != (L, S):
            raise RuntimeError(f"The shape of the 2D attn_mask is {attn_mask.shape}, but should be {(L, S)}.")
        if attn_mask is not None and attn_mask.dim() == 3 and attn_mask.shape != (N * H, L, S):
            raise RuntimeError(f"The shape of the 3D attn_mask is {attn_mask.shape}, but should be {(N * H, L, S)}.")
        if key_padding_mask is not None:
            expected = (N, S) if query.dim() == 3 else (S,)
            if tuple(key_padding_mask.shape) != expected:
                raise AssertionError(
                    f"key_padding_mask: expected shape {expected}, but got {tuple(key_padding_mask.shape)}"
                )

    def _heads(self, query, key, value, batched, batch_first, cache):
        """Projections as heads: (N, H, L, D), (N, Hk, S, D) twice, rotated, with what the cache holds."""

        def split(t, heads):
            t = t.unflatten(-1, (heads, self.head_dim))
            t = t if batched else t.unsqueeze(0)
            return t.transpose(1, 2) if batch_first else t.permute(1, 2, 0, 3)

        H, Hk = self.num_heads, self.num_kv_heads or self.num_heads
        if cache is not None and cache.fixed and cache.length:
            k, v = cache.get()
            length = key.shape[-2 if batch_first else 0]
            if k.shape[2] != length:
                raise ValueError(f"cache: expected keys of length {k.shape[2]} as in the first step, got {length}")
            return split(self._project_query(query), H), k, v
        q, k, v = self._project(query, key, value)
        q, k, v = split(q, H), split(k, Hk), split(v, Hk)
        if self.rotary is not None:
            first = 0 if cache is None else cache.length
            q, k = self.rotary(q, first), self.rotary(k, first)
        return (q, k, v) if cache is None else (q, *cache.append(k, v))

    def _widths(self):
        """Rows of the projections of query, key and value in in_proj_weight and in_proj_bias."""
        width = self.embed_dim if self.num_kv_heads is None else self.num_kv_heads * self.head_dim
        return self.embed_dim, width, width

    def _project(self, query, key, value):
        """Projections of the last dimension; views of one product where query, key and value are one tensor."""
        widths, bias = self._widths(), self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            return linear(query, self.in_proj_weight, bias).split(widths, -1)
        if self._qkv_same_embed_dim and key is value:
            E, weight = self.embed_dim, self.in_proj_weight
            k, v = linear(key, weight[E:], None if bias is None else bias[E:]).chunk(2, -1)
            return self._project_query(query), k, v
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.split(widths)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.split(widths)
        return tuple(linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))

    def _project_query(self, query):
        E, bias = self.embed_dim, self.in_proj_bias
        weight = self.in_proj_weight[:E] if self._qkv_same_embed_dim else self.q_proj_weight
        return linear(query, weight, None if bias is None else bias[:E])

    def _append_rows(self, k, v, attn_mask, key_padding_mask):
        """The extra keys of add_bias_kv and add_zero_attn, (N, H, rows, D), which no mask hides."""
        N, H, _, D = k.shape
        rows = 0
        if self.bias_k is not None:
            k, v = (
                torch.cat([t, row.to(t.dtype).view(1, H, 1, D).expand(N, H, 1, D)], 2)
                for t, row in ((k, self.bias_k), (v, self.bias_v))
            )
            rows += 1
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(N, H, 1, D)], 2) for t in (k, v))
            rows += 1
        attn_mask = None if attn_mask is None else pad(attn_mask, (0, rows))
        key_padding_mask = None if key_padding_mask is None else pad(key_padding_mask, (0, rows))
        return k, v, attn_mask, key_padding_mask

    def _options(self, q, k, attn_mask, key_padding_mask, is_causal, cache):
        """The operands of F.attention, those that are set."""
        options = {}
        N, H, L, S = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        if self.causal or (cache is not None and not cache.fixed):
            options["causal"] = "lower_right"
        if self.window is not None:
            options["window"] = self.window
        if self.alibi:
            options["alibi_slopes"] = alibi_slopes(H, q.device)
        by_length = not options
        # is_causal is a promise about attn_mask: torch takes it at its word just where nothing else is masked; with a
        # cache the rows of the mask are not the first ones
        hint = is_causal and key_padding_mask is None and attn_mask is not None and cache is None
        if (hint and (by_length or L == S)) or (L == S and is_causal_mask(attn_mask)):
            attn_mask = None
            options["causal"] = "upper_left"
        bias = mask = None
        if attn_mask is not None:
            attn_mask = attn_mask.view(N, H, L, S) if attn_mask.dim() == 3 else attn_mask[None, None]
            bias, mask = (None, ~attn_mask) if attn_mask.dtype == torch.bool else (attn_mask, None)
        if key_padding_mask is not None:
            more, visible, lengths = padding_operands(key_padding_mask, by_length)
            bias = more if bias is None else bias if more is None else bias + more
            mask = visible if mask is None else mask if visible is None else mask & visible
            if lengths is not None:
                options["key_lengths"] = lengths
        if bias is not None:
            options["bias"] = bias
        if mask is not None:
            options["mask"] = mask
        return options


def _weights(
    q, k, lse, bias=None, mask=None, causal=False, window=None, alibi_slopes=None, key_lengths=None, dropout_p=0.0,
    dropout_seed=None,
):  # fmt: skip
    """exp(score - lse) after dropout, (N, H, L, S): the only place where they are held as a matrix."""
    k = k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q * (q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    visible, distance = visible_keys(
        q.shape[2], k.shape[2], causal=causal, window=window, key_lengths=key_lengths, device=q.device
    )
    if bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.view(-1, 1, 1).to(scores.dtype) * distance.abs()
    if mask is not None:
        visible = visible & mask
    visible = visible & (scores != -torch.inf)
    zero = torch.zeros((), dtype=scores.dtype, device=scores.device)
    lse = torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)
    weights = torch.exp(torch.where(visible, scores, zero).to(lse.dtype) - lse)
    weights = torch.where(visible, weights, zero.to(weights.dtype))
    if dropout_p:
        weights = weights * (attention_dropout_mask(dropout_seed, *weights.shape, dropout_p, device=q.device))
        weights = weights * keep_scale(dropout_p)
    return weights.to(q.dtype)
