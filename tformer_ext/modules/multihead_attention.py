"""torch.nn.MultiheadAttention on the fused attention."""

import warnings

import torch
from torch import nn
from torch.nn.functional import linear, pad

from .. import functional as F
from ..reference import attention_dropout_mask
from ..reference.philox import keep_scale


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: same constructor, parameters, initial weights and forward.

    Differences, all towards what is meant: a query that may attend to nothing gets zeros (then out_proj's bias), never
    NaN, and zero weights; out_proj is called as a module, so that hooks and replacements (LoRA) take effect; with
    need_weights the output does not change, the weights are recomputed beside it.
    """

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
    ):
        """See torch.nn.MultiheadAttention.forward: arguments, shapes, errors and results are the same.

        Returns (output, weights): weights after dropout, (N, L, S) averaged over heads or (N, H, L, S), or None.
        """
        if any(t.is_nested for t in (query, key, value)):
            raise TypeError(
                "query, key, value: expected strided tensors, got a nested tensor; pad it and mask the keys"
            )
        self._check_inputs(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = self._transposed(query, key, value)

        # is_causal is a promise about attn_mask: torch drops the mask for it just where nothing else is masked
        hint = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._project(query, key, value)
        k, v, attn_mask, key_padding_mask = self._append_rows(k, v, attn_mask, key_padding_mask)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        bias, mask = _score_operands(None if hint else attn_mask, key_padding_mask, q, k)
        dropout_p = self.dropout if self.training else 0.0
        seed = torch.randint(0, 2**62, (), dtype=torch.int64, device=q.device) if dropout_p else None
        out, lse = F.attention(
            q,
            k,
            v,
            bias=bias,
            mask=mask,
            causal=hint,
            dropout_p=dropout_p,
            dropout_seed=seed,
            return_lse=True,
        )
        out = self.out_proj(out.transpose(1, 2).flatten(-2))
        weights = None
        if need_weights:
            weights = _weights(q, k, lse, bias, mask, dropout_p, seed)
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    @staticmethod
    def _transposed(query, key, value):
        if key is value:
            query, key = (query.transpose(0, 1),) * 2 if query is key else (t.transpose(0, 1) for t in (query, key))
            return query, key, key
        return tuple(t.transpose(0, 1) for t in (query, key, value))

    def _check_inputs(self, query, key, value, key_padding_mask, attn_mask, is_causal):
        """torch's own checks (their types and messages), made before anything is computed."""
        nn.functional._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        for name, t in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if t is not None and t.dtype != torch.bool and not t.is_floating_point():
                raise AssertionError(f"only bool and floating types of {name} are supported")
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

    def _project(self, query, key, value):
        """(N, L, E) projections; views of one packed product where query, key and value are one tensor."""
        E, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            return tuple(linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))
        weight = self.in_proj_weight
        if query is key and key is value:
            return linear(query, weight, bias).chunk(3, -1)
        if key is value:
            q = linear(query, weight[:E], None if bias is None else bias[:E])
            return q, *linear(key, weight[E:], None if bias is None else bias[E:]).chunk(2, -1)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(linear(t, w, b) for t, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True))

    def _append_rows(self, k, v, attn_mask, key_padding_mask):
        """The extra keys of add_bias_kv and add_zero_attn, which no mask hides."""
        rows = 0
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(v.shape[0], 1, -1)], 1)
            rows += 1
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(t.shape[0], 1, t.shape[2])], 1) for t in (k, v))
            rows += 1
        if rows:
            attn_mask = None if attn_mask is None else pad(attn_mask, (0, rows))
            key_padding_mask = None if key_padding_mask is None else pad(key_padding_mask, (0, rows))
        return k, v, attn_mask, key_padding_mask


def _score_operands(attn_mask, key_padding_mask, q, k):
    """torch's masks (bool True = hidden, float = added) as F.attention's bias and mask (bool True = may attend)."""
    N, H, L, S = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.view(N, H, L, S)
    padding = None if key_padding_mask is None else key_padding_mask.view(N, 1, 1, S)
    bias = mask = None
    for t in (attn_mask, padding):
        if t is None:
            continue
        if t.dtype == torch.bool:
            mask = ~t if mask is None else mask & ~t
        else:
            bias = t if bias is None else bias + t
    return bias, mask


def _weights(q, k, lse, bias, mask, dropout_p, seed):
    """exp(score - lse) after dropout, (N, H, L, S): the only place where they are held as a matrix."""
    scores = (q * (q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    visible = scores != -torch.inf
    zero = torch.zeros((), dtype=scores.dtype, device=scores.device)
    lse = torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)
    weights = torch.exp(torch.where(visible, scores, zero).to(lse.dtype) - lse)
    weights = torch.where(visible, weights, zero.to(weights.dtype))
    if dropout_p:
        weights = weights * (attention_dropout_mask(seed, *weights.shape, dropout_p, device=q.device))
        weights = weights * keep_scale(dropout_p)
    return weights.to(q.dtype)
