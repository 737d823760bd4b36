"""Same inputs, same bits: for any number of threads, in every run, in forked children and Python threads."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CASES, gradients, in_dtype, tensors

from tformer_ext import functional as F


def attention_results(case, dtype):
    torch.manual_seed(3)
    qkv, options = tensors(case, dtype)
    B, Hq, _, Sq, _, _, Dv = case.shape
    cotangents = torch.randn(B, Hq, Sq, Dv), torch.randn(B, Hq, Sq)
    outs, grads = gradients(F.attention, *in_dtype(qkv, options, dtype, True), cotangents)
    return [t.detach() for t in outs] + list(grads)


def norm_results(dtype):
    torch.manual_seed(4)
    x, residual = (torch.randn(3000, 100).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(100).to(dtype).requires_grad_() for _ in range(2))
    y, h = F.residual_layer_norm(x, residual, weight, bias, dropout_p=0.2, dropout_seed=8, return_residual=True)
    return [y.detach(), *torch.autograd.grad(y.sum() + h.sum(), (x, residual, weight, bias))]


def assert_same_bits(a, b):
    assert len(a) == len(b)
    for n, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), f"result {n} differs"


SPLIT = [c for c in CASES if c.shape[3] >= 70 or c.bias or "several" in c.name or "grouped" in c.name]


@pytest.mark.parametrize("case", SPLIT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_depend_on_threads(case, dtype, isa_of_attention, threads):
    threads(1)
    expected = attention_results(case, dtype)
    for count in (2, 5):
        threads(count)
        assert_same_bits(attention_results(case, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_does_not_depend_on_threads(dtype, isa, threads):
    threads(1)
    expected = norm_results(dtype)
    for count in (2, 5):
        threads(count)
        assert_same_bits(norm_results(dtype), expected)


BIG = next(c for c in CASES if c.name == "everything")


def test_repeated_runs(isa_of_attention):
    expected = attention_results(BIG, torch.float32)
    for _ in range(5):
        assert_same_bits(attention_results(BIG, torch.float32), expected)


def test_python_threads():
    expected = attention_results(BIG, torch.float32)
    qkv, options = tensors(BIG, torch.float32)
    alone = F.attention(*qkv, **options)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: F.attention(*qkv, **options), range(16)))
    for result in results:
        assert torch.equal(result, alone)
    assert_same_bits(attention_results(BIG, torch.float32), expected)


def _child(queue):
    torch.set_num_threads(1)
    queue.put([t.numpy() for t in attention_results(BIG, torch.float32)])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_child_processes(method):
    """A forked child of a process that has used its threads, as a DataLoader worker is."""
    expected = attention_results(BIG, torch.float32)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    result = [torch.from_numpy(a) for a in queue.get(timeout=120)]
    child.join(30)
    assert child.exitcode == 0
    assert_same_bits(result, expected)


def test_flush_denormal_of_the_caller(isa_of_attention):
    """torch.set_flush_denormal is the calling thread's own; other threads' tasks and the caller's are alike anyway."""
    q, k, v = (torch.randn(2, 4, 150, 32) * 10 for _ in range(3))
    v, slopes = v * 1e-37, torch.rand(4)
    expected = F.attention(q, k, v, scale=1.0, alibi_slopes=slopes)
    before = torch.full((4,), 1e-39) * 1.0
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU cannot")
        flushed = F.attention(q, k, v, scale=1.0, alibi_slopes=slopes)
        assert torch.equal(torch.full((4,), 1e-39) * 1.0, torch.zeros(4))
    finally:
        torch.set_flush_denormal(False)
    assert before.any() and torch.equal(torch.full((4,), 1e-39) * 1.0, before)
    assert torch.equal(flushed, expected)
