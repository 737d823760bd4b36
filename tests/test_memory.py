"""Memory of large results: reused, bounded, given back, never shared by two living tensors."""

import gc
import multiprocessing
import os
import threading

import pytest
import torch

import tformer_ext as tx
from tformer_ext import functional as F

ROWS, WIDTH = 2048, 1024
BYTES = ROWS * WIDTH * 4  # a result of this many is above the smallest kept block

pytestmark = pytest.mark.skipif(tx.memory.set_limit(tx.memory.set_limit(1)) == 0, reason="nothing is kept here")


@pytest.fixture(autouse=True)
def limit():
    """Starts each test with nothing kept and a known limit."""
    before = tx.memory.set_limit(0)
    tx.memory.set_limit(4 * BYTES)
    yield
    gc.collect()
    tx.memory.set_limit(0)
    tx.memory.set_limit(before)


def result(value=1.0, rows=ROWS):
    return F.residual_rms_norm(torch.full((rows, WIDTH), value))


def test_memory_of_a_freed_result_serves_the_next():
    first = result()
    address = first.data_ptr()
    del first
    assert tx.memory.kept_bytes() == BYTES
    second = result(-2.0)
    assert second.data_ptr() == address and tx.memory.kept_bytes() == 0
    torch.testing.assert_close(second, torch.full((ROWS, WIDTH), -1.0))


def test_living_results_share_nothing():
    tensors = [result(float(sign)) for sign in (1, -1, 1)]
    views = [t[::2] for t in tensors]
    del tensors
    assert tx.memory.kept_bytes() == 0  # a view keeps the whole alive
    assert [round(v.mean().item()) for v in views] == [1, -1, 1]


def test_the_limit_holds():
    tensors = [result() for _ in range(6)]
    del tensors
    assert tx.memory.kept_bytes() == 4 * BYTES
    assert tx.memory.set_limit(BYTES) == 4 * BYTES
    assert tx.memory.kept_bytes() == BYTES
    del_me = result(rows=4 * ROWS)  # larger than the limit
    del del_me
    assert tx.memory.kept_bytes() == BYTES
    tx.memory.release()
    assert tx.memory.kept_bytes() == 0
    t = result()
    del t
    assert tx.memory.kept_bytes() == BYTES


def test_small_results_and_other_sizes():
    small = F.residual_rms_norm(torch.ones(8, 16))
    del small
    assert tx.memory.kept_bytes() == 0
    large = result()
    del large
    other = result(rows=2 * ROWS)
    assert tx.memory.kept_bytes() == BYTES and other.shape == (2 * ROWS, WIDTH)


def test_medium_results():
    """Kept to their size, since few large ones would fit, and up to 32 MiB."""
    tx.memory.set_limit(64 * BYTES)
    first = result(rows=200)
    address = first.data_ptr()
    del first
    assert tx.memory.kept_bytes() == 13 * 2**16  # 800 KiB in steps of 64
    second = result(-2.0, rows=200)
    assert second.data_ptr() == address and tx.memory.kept_bytes() == 0
    tensors = [result(rows=256) for _ in range(40)]
    del tensors
    assert tx.memory.kept_bytes() == 32 * 2**20


def test_off():
    tx.memory.set_limit(0)
    t = result()
    del t
    assert tx.memory.kept_bytes() == 0


@pytest.mark.parametrize("wrong, error", [(-1, ValueError), ("1 GB", TypeError), (1.5, TypeError)])
def test_bad_limits(wrong, error):
    with pytest.raises(error, match="limit: expected"):
        tx.memory.set_limit(wrong)


def test_threads():
    failures = []

    def work(value):
        for _ in range(20):
            t = result(value)
            if not torch.all((t > 0) == (value > 0)):
                failures.append(value)
            del t

    workers = [threading.Thread(target=work, args=(value,)) for value in (1.0, -1.0, 2.0, -2.0)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def _in_child(queue):
    torch.set_num_threads(1)
    queue.put(result(-1.0).mean().item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_fork():
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
    parent = result()
    del parent
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert abs(queue.get(timeout=60) + 1) < 1e-5
    finally:
        child.join(60)
        child.kill()
    assert child.exitcode == 0 and abs(result().mean() - 1) < 1e-5


def test_gradients_and_sharing_between_processes():
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    y = F.residual_layer_norm(x, x)
    y.sum().backward()
    assert x.grad.shape == x.shape
    shared = y.detach().share_memory_()
    assert shared.is_shared() and torch.equal(shared, F.residual_layer_norm(x, x))
