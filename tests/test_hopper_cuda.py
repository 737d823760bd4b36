"""On an sm_90: the wrappers of gpu/hopper.h, and the kernels made of them. Skipped elsewhere."""

import os

import pytest
import torch
from cases import tensors
from hopper_cases import BACKWARD_CASES, DTYPES, HOPPER_CASES, check_gradients, check_values
from hopper_wrappers import (
    boxes_of,
    boxes_source,
    chain,
    multiply_across,
    multiply_down,
    multiply_registers,
    multiply_shared,
    ring,
)

import tformer_ext as tx
from tformer_ext import _C
from tformer_ext import functional as F

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("sm90")]


@pytest.fixture(scope="module")
def sm90():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


@pytest.fixture
def kernels(cuda):
    if "sm_90a" not in _C.build_info()["cuda"]:
        pytest.skip("needs a build for sm_90a")
    if os.environ.get("TFORMER_EXT_SM90") == "0":
        pytest.skip("TFORMER_EXT_SM90=0")


@pytest.fixture(scope="module")
def hardware():
    from emulation.library import Hardware

    try:
        return Hardware()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def run(hardware, name, source, more, out, **options):
    """out, as the kernel of hopper_kernels.cu leaves it."""
    out = out.cuda()
    assert hardware.run_hopper_wrapper(name, source.cuda(), more.cuda(), out, **options) is None
    return out.cpu()


def test_boxes(hardware):
    source = boxes_source()
    out = run(hardware, "boxes", source, source, torch.zeros(2, 32, 64, dtype=torch.int16), rows=(32, 32))
    assert torch.equal(out, boxes_of(source))


# What tensor cores leave off in sums of 64 is some 1e-5; an element in the wrong place is 1 and more.
@pytest.mark.parametrize("dtype, N", [("bf16", 32), ("bf16", 64), ("bf16", 80), ("bf16", 112), ("f16", 128)])
@pytest.mark.parametrize("n", [0, 1])
def test_products_of_shared_operands(dtype, N, n, hardware):
    a, b, c, expected = multiply_shared(dtype, N, n)
    out = run(hardware, f"shared_{dtype}_{N}", a, b, c, n=n, rows=(64, N))
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, N", [("bf16", 64), ("f16", 128), ("bf16", 128)])
@pytest.mark.parametrize("name, of", [("across", multiply_across), ("down", multiply_down)])
def test_products_down_columns(name, of, dtype, N, hardware):
    a, b, expected = of(dtype, N)
    out = run(hardware, f"{name}_{dtype}_{N}", a, b, torch.zeros(64, N), rows=(64, 64))
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, N", [("bf16", 64), ("f16", 128), ("bf16", 256)])
def test_products_of_registers(dtype, N, hardware):
    b, expected = multiply_registers(dtype, N)
    out = run(hardware, f"registers_{dtype}_{N}", b, b, torch.zeros(64, N), rows=(32, 32))
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


def test_blocks_take_turns(hardware):
    source, (zeros, expected) = torch.zeros(64, 64, dtype=torch.int16), chain()
    for _ in range(20):
        assert torch.equal(run(hardware, "chain", source, source, zeros), expected)


def test_ring(hardware):
    rows, expected = ring()
    out = run(hardware, "ring", rows, rows, torch.zeros(256, dtype=torch.int32), n=len(rows), rows=(8, 8))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(case, dtype, kernels):
    qkv, options = tensors(case, dtype)
    assert "wgmma" in tx.explain(*qkv, **options).product
    check_values(case, dtype)


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(case, dtype, kernels):
    qkv, options = tensors(case, dtype)
    assert not [note for note in tx.explain(*qkv, **options).notes if "backward: not the kernels" in note]
    check_gradients(case, dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128, 192, 256])
def test_runs_have_the_same_bits(D, causal, kernels):
    """Enough blocks for every multiprocessor, several times over."""
    q, k, v = (torch.randn(4, 16, 1000, D, dtype=torch.bfloat16) for _ in range(3))
    expected = F.attention(q, k, v, causal=causal, return_lse=True)
    for _ in range(20):
        for a, b in zip(F.attention(q, k, v, causal=causal, return_lse=True), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (300, 100)}], ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("heads", [16, 2])
def test_backward_runs_have_the_same_bits(D, options, heads, kernels):
    """Enough blocks for every multiprocessor, several times over: all wait for each other's sums."""
    q = torch.randn(4, 16, 2000, D, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(4, heads, 2000, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    out = F.attention(q, k, v, **options)
    cotangent = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True)
    for _ in range(20):
        for a, b in zip(torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("D", [128, 256])
def test_backward_in_a_graph(D, kernels):
    """Turns and the ticket begin anew in every replay."""
    q, k, v = (torch.randn(2, 4, 300, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    cotangent = torch.randn(2, 4, 300, D, dtype=torch.bfloat16)

    def gradients():
        return torch.autograd.grad(F.attention(q, k, v, causal=True), (q, k, v), cotangent)

    gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    with torch.no_grad():
        q.mul_(0.5), v.add_(1)
    for _ in range(3):
        graph.replay()
        for a, b in zip(captured, gradients(), strict=True):
            assert torch.equal(a, b)


def test_graph_capture(kernels):
    """The maps of the copy engine hold addresses: a graph is replayed on what then lies there."""
    q, k, v = (torch.randn(2, 4, 300, 128, dtype=torch.bfloat16) for _ in range(3))
    F.attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = F.attention(q, k, v)
    q.mul_(0.5), v.add_(1)
    graph.replay()
    assert torch.equal(out, F.attention(q, k, v))
