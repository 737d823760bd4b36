"""Real process groups (gloo) for tests: processes that stay up between tests, because starting them takes seconds.

def work(rank, world, scale): ...            # at the top of a test file, run by every rank

def test_work(ranks2):
    results = ranks2.run(work, 3.0)          # one result per rank; an error on any rank is raised here
"""

import contextlib
import os
import tempfile
import traceback
from datetime import timedelta
from multiprocessing import connection, get_context

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

TIMEOUT = 240.0
# One process imports all this and is forked for each rank; it has started no threads.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.tensor.parallel", "torch.distributed.fsdp", "tformer_ext", "pytest"]
)


@contextlib.contextmanager
def raises(error, message):
    """As pytest.raises, for code that the ranks run: the message is one of the text's parts."""
    try:
        yield
    except error as raised:
        assert message in str(raised), f"expected {message!r} in {raised!r}"
    else:
        raise AssertionError(f"{error.__name__} was not raised: {message}")


class Communication(TorchDispatchMode):
    """Counts what DTensors exchange: {"all_reduce": 2, ...}. torch's CommDebugMode has hooks on modules, which make
    three tensors of one that is query, key and value.
    """

    def __enter__(self):
        self.counts = {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it takes the operation apart, and its pieces come here
        name = function.overloadpacket.__name__
        if function.namespace in ("_c10d_functional", "c10d") and not name.startswith(("wait_tensor", "_wrap")):
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def _serve(rank, world, folder, pipe):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    while (job := pipe.recv()) is not None:
        function, arguments = job
        torch.manual_seed(0)
        try:
            pipe.send((True, function(rank, world, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """`world` processes in one process group, started by the first run and again after an error."""

    def __init__(self, world):
        self.world = world
        self.processes = []

    def _start(self):
        self.folder = tempfile.TemporaryDirectory()
        self.pipes = []
        for rank in range(self.world):
            ours, theirs = CONTEXT.Pipe()
            arguments = (rank, self.world, self.folder.name, theirs)
            process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, function, *arguments):
        """[function(rank, world, *arguments) of each rank]"""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results, waiting = [None] * self.world, set(range(self.world))
        while waiting:
            ready = connection.wait([self.pipes[r] for r in waiting], TIMEOUT)
            if not ready:
                self.stop()
                raise TimeoutError(f"{function.__name__}: no answer from ranks {sorted(waiting)} in {TIMEOUT} s")
            for rank in [r for r in waiting if self.pipes[r] in ready]:
                try:
                    fine, results[rank] = self.pipes[rank].recv()
                except EOFError:
                    fine, results[rank] = False, "the process died"
                waiting.discard(rank)
                if not fine:
                    self.stop()
                    raise AssertionError(f"{function.__name__}: rank {rank} of {self.world}:\n{results[rank]}")
        return results

    def stop(self):
        """Ends the processes: at once, because after an error on one rank the others may wait for it for ever."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.processes = []
