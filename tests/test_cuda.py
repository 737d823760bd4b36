"""On a GPU: the CPU's results, streams, graphs, devices, torch.compile. Skipped where there is none."""

import pytest
import torch
from hopper_wrappers import chain

import tformer_ext as tx
from tformer_ext import _C, reference
from tformer_ext import functional as F
from tformer_ext.arguments import has_cuda_kernels

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]

NORM = {"dropout_p": 0.3, "dropout_seed": 11, "return_residual": True}
ATTENTION = {"causal": True, "dropout_p": 0.2, "dropout_seed": 12}


@pytest.fixture(scope="module")
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if not _C.build_info()["cuda"]:
        pytest.skip("needs a build with CUDA kernels")


def norm(x, residual, weight, bias):
    return F.residual_layer_norm(x, residual, weight, bias, **NORM)[0]


def attention(query, key, value):
    return F.attention(query, key, value, **ATTENTION)


def norm_inputs(dtype, device="cuda"):
    draw = torch.Generator().manual_seed(1)
    shapes = ((50, 300), (50, 300), (300,), (300,))
    return [torch.randn(s, generator=draw).to(device, dtype).requires_grad_() for s in shapes]


def attention_inputs(dtype, device="cuda"):
    draw = torch.Generator().manual_seed(2)
    shapes = ((2, 4, 70, 64), (2, 2, 90, 64), (2, 2, 90, 32))
    return [torch.randn(s, generator=draw).to(device, dtype).requires_grad_() for s in shapes]


OPERATIONS = {"residual_norm": (norm, norm_inputs), "attention": (attention, attention_inputs)}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=OPERATIONS)
def operation(request):
    """(function, inputs)"""
    if not has_cuda_kernels(request.param):
        pytest.skip(f"this build has no CUDA kernels of {request.param}")
    return OPERATIONS[request.param]


@pytest.fixture
def wrappers(emulation):
    """Two functions run_wrapper: emulated and on the GPU."""
    from emulation.library import Hardware

    try:
        return emulation.run_wrapper, Hardware().run_wrapper
    except FileNotFoundError as error:
        pytest.skip(str(error))


def with_gradients(function, inputs):
    out = function(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_those_of_the_cpu(operation, dtype):
    """The same dropout mask among them; each backend is held to float64 elsewhere."""
    function, inputs = operation
    theirs, ours = with_gradients(function, inputs(dtype, "cpu")), with_gradients(function, inputs(dtype))
    allowed = 16 * torch.finfo(dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        assert a.is_cuda and a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b, rtol=allowed, atol=allowed * b.abs().max().item())


def test_runs_have_the_same_bits(operation):
    function, inputs = operation
    for dtype in (torch.float32, torch.bfloat16):
        expected = with_gradients(function, inputs(dtype))
        for _ in range(5):
            for a, b in zip(with_gradients(function, inputs(dtype)), expected, strict=True):
                assert torch.equal(a, b)


def test_current_stream_is_used(operation):
    """The input is still being written when the call is made; another stream would read it too early."""
    function, inputs = operation
    with torch.no_grad():
        given = [t.detach() for t in inputs(torch.float32)]
        expected = function(*given)
        late = [torch.zeros_like(t) for t in given]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            for to, t in zip(late, given, strict=True):
                to.copy_(t)
            out = function(*late)
        stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("drawn", [False, True])
def test_graph_capture(operation, drawn, monkeypatch):
    """Forward and backward replayed on other inputs; a seed drawn inside gives each replay another mask."""
    function, inputs = operation
    options = NORM if function is norm else ATTENTION
    if drawn:
        monkeypatch.setitem(options, "dropout_seed", None)
    static = inputs(torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        with_sum(function, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = with_sum(function, static)
    with torch.no_grad():
        for t in static:
            t.mul_(0.5)
    graph.replay()
    first = [t.clone() for t in results]
    if drawn:
        graph.replay()
        assert not torch.equal(results[0], first[0])
    else:
        for a, b in zip(first, with_sum(function, static), strict=True):
            assert torch.equal(a, b)


def with_sum(function, inputs):
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.sum(), inputs)]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(operation, mode):
    function, inputs = operation
    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for _ in range(3):
        given = inputs(torch.float32)
        actual = [t.clone() for t in with_sum(compiled, given)]
        for a, b in zip(actual, with_sum(function, given), strict=True):
            torch.testing.assert_close(a, b)


def test_no_call_waits_for_the_gpu(operation):
    function, inputs = operation
    given = inputs(torch.bfloat16)
    with_sum(function, given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_sum(function, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_second_device(operation):
    """Without torch.cuda.set_device: the tensors' device counts."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    function, inputs = operation
    first, second = (with_gradients(function, inputs(torch.float32, f"cuda:{n}")) for n in (0, 1))
    assert torch.cuda.current_device() == 0
    for a, b in zip(first, second, strict=True):
        assert b.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_seed_on_the_cpu():
    x = torch.ones(9, 201, device="cuda")
    kept = reference.norm_dropout_mask(5, 9, 201, 0.5, device="cuda")
    for seed in (5, torch.tensor(5), torch.tensor(5, device="cuda")):
        _, h = F.residual_layer_norm(x, dropout_p=0.5, dropout_seed=seed, return_residual=True)
        assert torch.equal(h != 0, kept)


def test_tensors_of_two_devices():
    x = torch.ones(4, 6, device="cuda")
    with pytest.raises(ValueError, match="weight: expected a tensor on cuda"):
        F.residual_layer_norm(x, None, torch.ones(6))
    with pytest.raises(RuntimeError, match="one device"):
        torch.ops.tformer_ext._residual_norm_forward(x, None, torch.ones(6))


def test_head_dimension_above_256():
    if not has_cuda_kernels("attention"):
        pytest.skip("this build has no CUDA kernels of attention")
    query = torch.randn(1, 1, 4, 257, device="cuda")
    for options in ({}, {"causal": True}):
        with pytest.raises(NotImplementedError, match="query: expected a head dimension up to 256 on CUDA, got 257"):
            F.attention(query, query, query, **options)


def test_autocast_is_torchs():
    x = torch.randn(4, 8, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        ours, stock = F.residual_layer_norm(x, None, weight), torch.nn.functional.layer_norm(x, (8,), weight)
    assert ours.dtype == stock.dtype
    torch.testing.assert_close(ours, stock)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.zeros(2**31 // 1024 + 3, 1024, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(1024, device="cuda")
    assert torch.equal(F.residual_layer_norm(x)[-1], F.residual_layer_norm(x[-1:])[0])


def test_wrappers_on_hardware(wrappers):
    """Each wrapper of gpu/device.h: what the emulation gives is what the GPU gives."""
    emulation, hardware = wrappers
    draw = torch.Generator().manual_seed(4)

    def same(name, source, more, out, rtol=0.0, **options):
        on_gpu = out.cuda()
        assert emulation(name, source, more, out, **options) is None
        moved = [None if t is None else t.cuda() for t in (source, more)]
        assert hardware(name, *moved, on_gpu, **options) is None
        torch.testing.assert_close(on_gpu.cpu(), out, rtol=rtol, atol=rtol, equal_nan=True)

    for name, dtype in (("multiply_bf16", torch.bfloat16), ("multiply_f16", torch.float16)):
        a, b = (torch.randn(s, generator=draw).to(dtype) for s in ((16, 16), (16, 8)))
        same(name, a, b, torch.zeros(16, 8), rtol=1e-5)
    a, b = torch.randn(16, 8, generator=draw), torch.randn(8, 8, generator=draw)
    same("multiply_tf32", a, b, torch.zeros(16, 8), rtol=1e-5)
    matrices = torch.arange(256, dtype=torch.int16)
    same("load_matrices", matrices, None, torch.zeros(4, 32, 4, dtype=torch.int32), shared_bytes=512)
    x, y = torch.randn(32, generator=draw), torch.randn(32, generator=draw, dtype=torch.float64)
    same("shuffle", x, y, torch.zeros(6, 32, dtype=torch.float64))
    x = torch.randint(-9, 9, (5, 256), generator=draw).float()
    same("block_sum", x, None, torch.zeros(5, 128), blocks=5, shared_bytes=1024)
    x = torch.cat([torch.randn(512, generator=draw) * s for s in (1e-6, 1.0, 1e3)])
    same("numbers", x, None, torch.zeros(12, len(x)), n=len(x), blocks=len(x) // 64, rtol=1e-6)
    source = torch.arange(272, dtype=torch.int16).to(torch.uint8)
    same("partial_copies", source, None, torch.zeros(272, dtype=torch.uint8), shared_bytes=512)
    zeros, sums = chain()
    same("turns", None, None, zeros, blocks=12, shared_bytes=16)
    assert torch.equal(zeros, sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_explain(dtype):
    if not has_cuda_kernels("attention"):
        pytest.skip("this build has no CUDA kernels of attention")
    query = torch.randn(1, 2, 5, 8, device="cuda").to(dtype)
    told = tx.explain(query, query, query)
    assert told.backend == "cuda" and told.isa.startswith("sm_")
    assert ("tensor cores" in told.product) == (dtype in (torch.bfloat16, torch.float16))
