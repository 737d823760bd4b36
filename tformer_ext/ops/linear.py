"""linear_few_rows: the raw operator and its fake kernel. It is for inference, and has no gradient formula."""

import torch

from .recording import by_short_way

linear_few_rows = by_short_way(torch.ops.tformer_ext._linear_few_rows.default)


@torch.library.register_fake("tformer_ext::_linear_few_rows")
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
