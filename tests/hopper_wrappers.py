"""Inputs of the kernels of emulation/hopper_kernels.cu and what they give, for the emulation and for a GPU."""

import torch

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def boxes_source():
    """(2, 3, 70, 72) int16, every element another."""
    return torch.arange(2 * 3 * 70 * 72).to(torch.int16).view(2, 3, 70, 72)


def boxes_of(source):
    """Shared memory after the copies of rows 50 to 81 of head 2 of batch 1, in two boxes of 64 columns.

    Zeros where there is nothing; chunk c of row r at chunk c ^ r % 8.
    """
    padded = torch.zeros(32, 128, dtype=torch.int16)
    padded[:20, :72] = source[1, 2, 50:]
    boxes = padded.view(32, 2, 8, 8).transpose(0, 1)  # (box, row, chunk, 8 elements)
    chunks = torch.arange(8) ^ (torch.arange(32) % 8).unsqueeze(1)  # where each chunk of a row lies
    out = torch.empty_like(boxes)
    out.scatter_(2, chunks.view(1, 32, 8, 1).expand(2, -1, -1, 8), boxes)
    return out.reshape(2, 32, 64)


def multiply_shared(dtype, N, n):
    """a (64, 64), b (N, 64), c (64, N) float32, and what c becomes: a bT, added to c unless n is 1."""
    draw = torch.Generator().manual_seed(N)
    a, b = (torch.randn(rows, 64, generator=draw).to(DTYPES[dtype]) for rows in (64, N))
    c = torch.randn(64, N, generator=draw)
    return a, b, c, a.double() @ b.double().T + (c.double() if n != 1 else 0)


def multiply_across(dtype, N):
    """a (64, 64), b (64, N), and aT b."""
    draw = torch.Generator().manual_seed(N)
    a, b = (torch.randn(64, columns, generator=draw).to(DTYPES[dtype]) for columns in (64, N))
    return a, b, a.double().T @ b.double()


def multiply_down(dtype, N):
    """a (64, 64), b (64, N), and a b."""
    a, b, _ = multiply_across(dtype, N)
    return a, b, a.double() @ b.double()


def chain():
    """What twelve blocks add to, float32 (64) and two int32 words, and what becomes of it: rounded in their order."""
    sums = torch.zeros(64)
    for n in range(12):
        sums += torch.tensor([3e7, 1.25, -2.9e7])[n % 3] + (torch.arange(64) + n)
    words = torch.tensor([12, 12], dtype=torch.int32)
    return torch.zeros(66), torch.cat([sums, words.view(torch.float32)])


def multiply_registers(dtype, N):
    """b (32, N), and x b for the x of the kernel."""
    b = torch.randn(32, N, generator=torch.Generator().manual_seed(N)).to(DTYPES[dtype])
    x = torch.eye(32).repeat(2, 1)
    x[:, 0] = torch.where(x[:, 0] == 1, 1.0, 2.0)
    return b, x.double() @ b.double()


def ring():
    """rows (72, 64) int16, and each thread's sum: the swizzle undone, its column over all rows."""
    rows = torch.randint(0, 9, (72, 64), generator=torch.Generator().manual_seed(5)).to(torch.int16)
    return rows, rows.int().sum(0).repeat(4).int()
