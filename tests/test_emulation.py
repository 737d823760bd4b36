"""The emulation itself: its wrappers do what the PTX ISA says, and planted faults are found."""

import re

import pytest
import torch
from hopper_wrappers import chain


@pytest.fixture
def run(emulation):
    """run(kernel, in, more, out, n=0, blocks=1, shared_bytes=0): the error message, or None."""
    return emulation.run_wrapper


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "multiply_bf16"), (torch.float16, "multiply_f16")])
def test_mma(run, dtype, name):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    expected = c.double() + a.double() @ b.double()
    assert run(name, a, b, c) is None
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


def test_mma_tf32(run):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.empty(16, 8)
    assert run("multiply_tf32", a, b, c) is None
    # 10 bits of mantissa are kept
    short = [((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double() for t in (a, b)]
    torch.testing.assert_close(c.double(), short[0] @ short[1], rtol=1e-5, atol=1e-5)


def test_load_matrix(run):
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(4, 32, 4, dtype=torch.int32)
    assert run("load_matrices", matrices, None, out, shared_bytes=512) is None
    pairs = matrices.int().view(4, 8, 4, 2)
    straight = (pairs[..., 0] | pairs[..., 1] << 16).reshape(4, 32).T
    across = matrices.int().transpose(1, 2).contiguous().view(4, 8, 4, 2)
    transposed = (across[..., 0] | across[..., 1] << 16).reshape(4, 32).T
    assert torch.equal(out[0], straight) and torch.equal(out[1], transposed)
    assert torch.equal(out[2, :, :2], straight[:, :2]) and torch.equal(out[3, :, :2], transposed[:, :2])


def test_shuffles(run):
    x, y, out = torch.randn(32), torch.randn(32, dtype=torch.float64), torch.empty(6, 32, dtype=torch.float64)
    assert run("shuffle", x, y, out) is None
    lanes = torch.arange(32)
    assert torch.equal(out[0], x[lanes ^ 5].double())
    assert torch.equal(out[1], y[torch.where(lanes + 3 < 32, lanes + 3, lanes)])
    assert torch.equal(out[2], x[7].double().expand(32)) and torch.equal(out[3], y.roll(-1))
    votes = sum(1 << n for n in range(32) if x[n] > 0)
    assert out[4].eq(votes).all() and out[5].eq(1).all()


def test_barriers_and_background_copies(run, emulation):
    x = torch.randint(-9, 9, (5, 256)).float()
    expected = x[:, :128].unflatten(1, (2, 64)).sum(2).repeat_interleave(64, 1) + x[:, 128:].sum(1, keepdim=True)
    for seed in range(10):
        emulation.set_seed(seed)
        out = torch.empty(5, 128)
        assert run("block_sum", x, None, out, blocks=5, shared_bytes=1024) is None
        assert torch.equal(out, expected)


SPECIAL = [0.0, -0.0, 1e-45, 6e-8, 6.1e-5, 1.0, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, 65519.0, 65520.0, 3.4e38]


def test_numbers(run):
    x = torch.cat([torch.tensor([*SPECIAL, float("inf"), float("-inf"), float("nan")]), 1e3 * torch.randn(500)])
    x = torch.cat([x, 1e-6 * torch.randn(500), torch.randn(500)])
    out = torch.empty(12, len(x))
    assert run("numbers", x, None, out, n=len(x), blocks=(len(x) + 63) // 64) is None
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    for row, dtype in ((0, torch.bfloat16), (2, torch.float16)):
        torch.testing.assert_close(out[row], x.to(dtype).float(), **same)
        torch.testing.assert_close(out[row + 1], (-x).to(dtype).float(), **same)
        positive = [torch.where(t < 0, 0.0, t).to(dtype).float() for t in (x, -x)]
        for n in (0, 1):
            torch.testing.assert_close(out[8 + row + n], positive[n], **same)
    torch.testing.assert_close(out[6], x.half().float(), **same)
    normal = x.abs() > 1e-37
    torch.testing.assert_close(out[4][normal], x[normal], rtol=2**-11, atol=0, equal_nan=True)
    torch.testing.assert_close(out[5], torch.exp2(x), rtol=3e-7, atol=2**-126, equal_nan=True)
    torch.testing.assert_close(out[7][normal], x[normal].abs().rsqrt(), rtol=3e-7, atol=0, equal_nan=True)


def test_partial_copies_end_in_zeros(run):
    source = torch.arange(1, 1 + 16 * 17, dtype=torch.int16).to(torch.uint8).view(17, 16)
    out = torch.full((17, 16), 7, dtype=torch.uint8)
    assert run("partial_copies", source, None, out, shared_bytes=512) is None
    kept = torch.arange(16) < torch.arange(17).unsqueeze(1)
    assert torch.equal(out, torch.where(kept, source, 0))


def test_race_shows(run, emulation):
    """Without the barrier some orders read what is not yet there; with it none does."""
    results = {0: set(), 1: set()}
    for guarded, found in results.items():
        for seed in range(20):
            emulation.set_seed(seed)
            out = torch.empty(64, dtype=torch.int32)
            assert run("race", None, None, out, n=guarded, shared_bytes=256) is None
            found.add(tuple(out.tolist()))
    assert len(results[0]) > 1
    assert results[1] == {tuple((n + 32) % 64 for n in range(64))}


def sums_in_turns(run, emulation, fault):
    """Whether they were as expected, for each of some orders."""
    zeros, expected = chain()
    for seed in range(20):
        emulation.set_seed(seed)
        out = zeros.clone()
        assert run("turns", None, None, out, n=fault, blocks=12, shared_bytes=16) is None
        yield torch.equal(out, expected)


def test_blocks_take_turns(run, emulation):
    assert all(sums_in_turns(run, emulation, 0))


@pytest.mark.parametrize("fault", [1, 2])
def test_blocks_out_of_turn_show(fault, run, emulation):
    assert not all(sums_in_turns(run, emulation, fault))


@pytest.mark.parametrize(
    "n, expected",
    [
        (0, r"wait for each other.*shuffle_xor \(wrapper_kernels.cu:\d+\)"),
        (1, r"wait for each other.*32 of them.*sync_block \(wrapper_kernels.cu:\d+\)"),
        (2, r"lanes of its warp diverge"),
        (3, r"wait for each other.*63 of them.*sync_block.*ended"),
    ],
)
def test_divergence_is_an_error(run, n, expected):
    message = run("divergence", None, None, torch.zeros(64, dtype=torch.int32), n=n)
    assert message is not None
    assert re.search(expected, message), message


@pytest.mark.parametrize("n", [0, 1, 2])
def test_what_is_not_there_yet_is_nan(run, n):
    out = torch.zeros(32)
    assert run("too_early", torch.ones(32), None, out, n=n, shared_bytes=128) is None
    assert torch.isnan(out).all()


@pytest.mark.parametrize("n, expected", [(0, "outside"), (1, "outside"), (2, "not aligned")])
def test_addresses_are_checked(run, n, expected):
    message = run("outside", torch.ones(32), None, torch.ones(32), n=n, shared_bytes=512)
    assert message is not None and "copy_async_16" in message and expected in message


def test_a_failed_launch_leaves_the_next_one_alone(run):
    out = torch.zeros(64, dtype=torch.int32)
    assert run("divergence", None, None, out, n=0) is not None
    assert run("race", None, None, out, n=1, shared_bytes=256) is None


def test_launch_limits(run):
    assert "shared memory" in run("race", None, None, torch.zeros(64, dtype=torch.int32), shared_bytes=200 << 10)
    assert run("race", None, None, torch.zeros(64, dtype=torch.int32), blocks=0) is None
