"""More than 2**31 elements: no index anywhere may be a 32-bit one."""

from pathlib import Path

import pytest
import torch

from tformer_ext import functional as F

pytestmark = pytest.mark.slow


def available_bytes() -> int:
    """Memory that can be taken without swapping; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def need(gigabytes: int) -> None:
    if available_bytes() < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GiB of free memory")


def test_attention():
    need(12)
    rows, width = (1 << 25) + 7, 64
    query = torch.zeros(1, 1, rows, width, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 1, 5, width).bfloat16().unbind()
    query[..., -7:, :] = torch.randn(7, width)
    out = F.attention(query, key, value)
    assert torch.equal(out[..., -7:, :], F.attention(query[..., -7:, :], key, value))
    assert torch.equal(out[..., -8, :], out[..., 0, :])


def test_residual_norm():
    need(12)
    rows, width = (1 << 21) + 3, 1024
    x = torch.zeros(rows, width, dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, width)
    y = F.residual_layer_norm(x)
    assert torch.equal(y[-3:], F.residual_layer_norm(x[-3:]))
    assert torch.equal(y[-4], torch.zeros(width, dtype=torch.bfloat16))
