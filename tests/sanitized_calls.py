"""Small calls of every kind of CUDA kernel, for compute-sanitizer: `make gpu-check` runs it."""

import torch

from tformer_ext import functional as F
from tformer_ext.arguments import has_cuda_kernels

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def norms():
    for dtype in DTYPES:
        for rows, width in ((40, 72), (9, 1001), (3, 4100), (2, 17000)):
            x, residual = (torch.randn(rows, width, dtype=dtype, requires_grad=True) for _ in range(2))
            weight, bias = (torch.randn(width, dtype=dtype, requires_grad=True) for _ in range(2))
            F.residual_layer_norm(x, residual, weight, bias, dropout_p=0.2, dropout_seed=1).sum().backward()


def attention():
    options = {"causal": "lower_right", "dropout_p": 0.2, "dropout_seed": 2, "softcap": 5.0}
    for dtype in DTYPES:
        for D in (33, 64, 128, 256):
            query = torch.randn(1, 4, 70, D, dtype=dtype, requires_grad=True)
            key, value = (torch.randn(1, 2, 133, D, dtype=dtype, requires_grad=True) for _ in range(2))
            bias = torch.randn(1, 4, 70, 133, dtype=dtype, requires_grad=True)
            F.attention(query, key, value, bias=bias, **options).sum().backward()
            plain = [t.detach() for t in (query, key, value)]
            F.attention(plain[0][:, :, :1], *plain[1:])
            F.attention(*plain, causal=True)
            out = F.attention(query, key, value, causal=True)
            out.backward(torch.randn_like(out))  # dense, as the copy engine wants it


if __name__ == "__main__":
    with torch.device("cuda"):
        if has_cuda_kernels("residual_norm"):
            norms()
        if has_cuda_kernels("attention"):
            attention()
    torch.cuda.synchronize()
