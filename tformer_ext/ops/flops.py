"""Operations of the attention operators, for torch.utils.flop_counter.FlopCounterMode.

Two for each multiply-add of the products, two products forward and five backward, over all pairs of a query and a key:
as torch counts its own attention, whatever masks hide. Packed sequences have their own pairs only.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.tformer_ext


def _pairs(query, key, cu_seqlens_q=None, cu_seqlens_k=None):
    B, Hq, Sq, _ = query.shape
    if type(cu_seqlens_q) is type(cu_seqlens_k) is torch.Tensor:  # in a trace their values are not known
        lengths = (t.diff().tolist() for t in (cu_seqlens_q, cu_seqlens_k))
        return Hq * sum(q * k for q, k in zip(*lengths, strict=True))
    return B * Hq * Sq * key.shape[2]


@register_flop_formula([_ops._attention_forward, _ops._attention_inference], get_raw=True)
def _forward(query, key, value, *others, out_val=None):
    return 2 * _pairs(query, key, *others[5:7]) * (query.shape[3] + value.shape[3])


@register_flop_formula(_ops._attention_backward, get_raw=True)
def _backward(_grad_out, _grad_lse, query, key, value, _out, _lse, *others, out_val=None):
    return 2 * _pairs(query, key, *others[5:7]) * (3 * query.shape[3] + 2 * value.shape[3])
