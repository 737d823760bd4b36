"""Timing of contenders in turn, and what a call allocates."""

import contextlib
import gc
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .. import memory
from .weather import ENOUGH, STILL, Probe, Weather

# A shorter batch would measure the clock; calls are repeated until one is this long.
BATCH_SECONDS = 1e-3
MOST_ROUNDS = 400
# A shorter call follows a few of its own kind that are not timed: what it finds in the caches is what those left, not
# what another contender did. One is not enough: a last-level cache gives up what it holds in three or four passes over
# other things. Longer calls go through several times what the caches hold, or many times through what fits in.
FOLLOWS_ITSELF_SECONDS = 3e-3
UNTIMED_CALLS = 3
GPU_HERTZ = 2.2e9  # no GPU's clock is much faster: torch.cuda._sleep counts its ticks


@dataclass
class Contender:
    """One way to do a job: `call` is timed, `prepare` runs before it outside the timing."""

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] | None = None
    is_peer: bool = True  # does the same job, so a ratio to it means something
    compiles: bool = False  # its first call says nothing about the next ones


@dataclass(frozen=True)
class Batch:
    """Seconds per call; the slower one of the probes before and after, None on a GPU, which is nobody else's."""

    seconds: float
    probe: Probe | None = None


@dataclass
class Timing:
    """All batches in order; calls and minor page faults in them; what one call allocated beyond its results."""

    batches: list[Batch] = field(default_factory=list)
    calls: int = 0
    page_faults: int = 0
    extra_bytes: int | None = None
    lasting: bool = False  # one call takes several budgets: it is a batch, and the only one of a pass

    @property
    def enough(self) -> int:
        """Batches in still weather, from which on no more are wanted."""
        return 1 if self.lasting else ENOUGH

    def seconds(self, weather: Weather) -> list[float]:
        """Of the batches that count, ascending: those in still weather, the `enough` stillest ones at least."""
        speeds = [1.0 if batch.probe is None else weather.speed(batch.probe) for batch in self.batches]
        least = min(STILL, sorted(speeds)[-self.enough :][0])
        return sorted(batch.seconds for batch, speed in zip(self.batches, speeds, strict=True) if speed >= least)

    def still(self, weather: Weather) -> int:
        """How many batches were in still weather."""
        return sum(batch.probe is None or weather.speed(batch.probe) >= STILL for batch in self.batches)

    def extend(self, later: "Timing") -> None:
        """Adds what was measured later."""
        self.batches += later.batches
        self.calls += later.calls
        self.page_faults += later.page_faults


@dataclass
class Options:
    """What applies to every case of a run."""

    threads: int = 1
    budget: float = 0.6  # seconds for each contender of a case
    compile: bool = False  # also time torch.compile of the eager chain
    memory: bool = True  # also count what one call allocates
    device: str = "cpu"  # where the contenders' tensors are
    weather: Weather = field(default_factory=Weather)


@dataclass
class Plan:
    """How a contender is timed: `inner` calls a batch after `untimed` ones, one batch in each of `rounds` rounds."""

    contender: Contender
    timing: Timing
    inner: int = 1
    untimed: int = 0
    rounds: int = 0
    done: int = 0
    head_start: float = 0.0  # seconds before each call that a GPU waits, so that it never waits for the host later


def measure(contenders: list[Contender], options: Options) -> dict[str, Timing]:
    """Times all contenders in the same rounds, so that a change of the machine's speed meets all of them.

    Each round goes through the contenders starting from another one. A slow contender takes part in fewer rounds,
    evenly spread over all, at least 3 unless one call alone is longer than its budget. A contender that cannot run here
    (RuntimeError, NotImplementedError) is left out of the result; the first one, ours, must run.
    """
    plans = []
    for contender in contenders:
        try:
            plans.append(_plan(contender, options))
        except (RuntimeError, NotImplementedError):
            if contender is contenders[0]:
                raise
    total = max(plan.rounds for plan in plans)
    with _no_garbage_collection():
        for n in range(total):
            for shift in range(len(plans)):
                plan = plans[(n + shift) % len(plans)]
                if plan.done < math.ceil((n + 1) * plan.rounds / total):
                    _batch(plan, options)
    for plan in plans:
        if options.memory and plan.contender.is_peer and plan.timing.batches[0].seconds < 1.0:
            measured = extra_gpu_bytes if options.device == "cuda" else extra_bytes
            plan.timing.extra_bytes = measured(plan.contender)
    return {plan.contender.name: plan.timing for plan in plans}


def _plan(contender: Contender, options: Options) -> Plan:
    """Warms the contender up and spreads its budget."""
    plan = Plan(contender, Timing())
    if options.device == "cuda":
        _timed(contender, 1, options)  # loads kernels and makes plans, seconds that say nothing of a slow call
        plan.head_start = 1.5 * _launch_seconds(contender)
    first = _timed(contender, 1, options, plan.head_start)
    if not contender.compiles and first.seconds > 4 * options.budget:
        plan.timing = Timing([first], calls=1, lasting=True)
        return plan
    second = _timed(contender, 1, options, plan.head_start).seconds
    if second < BATCH_SECONDS:  # too short to judge by one call
        second = min(second, _timed(contender, 10, options, plan.head_start).seconds)
    plan.inner = max(1, math.ceil(BATCH_SECONDS / second))
    plan.untimed = UNTIMED_CALLS if second < FOLLOWS_ITSELF_SECONDS else 0
    plan.rounds = min(MOST_ROUNDS, max(3, int(options.budget / (second * (plan.inner + plan.untimed)))))
    return plan


def _batch(plan: Plan, options: Options) -> None:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    plan.timing.batches.append(_timed(plan.contender, plan.inner, options, plan.head_start, plan.untimed))
    plan.timing.page_faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    plan.timing.calls += plan.inner + plan.untimed
    plan.done += 1


def _timed(contender: Contender, count: int, options: Options, head_start: float = 0.0, untimed: int = 0) -> Batch:
    if contender.prepare is not None:
        contender.prepare()
    call = contender.call
    if options.device == "cuda":
        return Batch(_timed_by_events(call, count, head_start, untimed) / count)
    before = options.weather.probe()
    for _ in range(untimed):
        call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    seconds = time.perf_counter() - start
    after = options.weather.probe()
    return Batch(seconds / count, max(before, after, key=lambda probe: probe.seconds))


def _timed_by_events(call: Callable[[], object], count: int, head_start: float, untimed: int) -> float:
    """Seconds on the GPU's clock from before the first call to after the last. The host gets a head start: torch's
    autograd alone takes longer to begin a short backward call than the call takes, whoever's kernels it is."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if head_start:
        torch.cuda._sleep(int((count + untimed) * head_start * GPU_HERTZ))
    for _ in range(untimed):
        call()
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _launch_seconds(contender: Contender) -> float:
    """What one call takes of the host, on a GPU with nothing else to do."""
    if contender.prepare is not None:
        contender.prepare()
    torch.cuda.synchronize()
    start = time.perf_counter()
    contender.call()
    return time.perf_counter() - start


@contextlib.contextmanager
def _no_garbage_collection():
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def extra_bytes(contender: Contender) -> int:
    """The most bytes that torch's allocator held during one call beyond those of the call's results.

    Ours come from it meanwhile too, since no memory of freed ones is kept. What does not go through it is not seen,
    above all the working memory of our threads.
    """
    if contender.prepare is not None:
        contender.prepare()
    activities = [torch.profiler.ProfilerActivity.CPU]
    limit = memory.set_limit(0)
    try:
        with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
            results = contender.call()
    finally:
        memory.set_limit(limit)
    events = profiler.profiler.kineto_results.events()
    held = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        most = max(most, held)
    del results
    return most - held


def extra_gpu_bytes(contender: Contender) -> int:
    """As extra_bytes, of the memory of the GPU."""
    if contender.prepare is not None:
        contender.prepare()
    torch.cuda.reset_peak_memory_stats()
    results = contender.call()
    most, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del results
    return most - held


@contextlib.contextmanager
def _quiet():
    """Nothing written to the standard error's descriptor gets out: torch's profiler announces every start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
