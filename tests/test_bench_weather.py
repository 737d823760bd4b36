"""Which batches of a benchmark count: what was measured while the machine was busy with other things."""

import argparse
import dataclasses
import io
import signal
import time

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console

from tformer_ext.bench import ceilings, harness, weather
from tformer_ext.bench.job import OURS, Floor, Job, Measurement
from tformer_ext.commands import bench


def timing(weather, pairs):
    """A timing of batches of (seconds, seconds of the probe)."""
    made = [harness.Batch(seconds, weather.add(1, probe)) for seconds, probe in pairs]
    return harness.Timing(made, calls=len(made))


def test_batches_in_still_weather_count():
    still, busy = [(1.0, 10.0), (1.1, 11.0), (1.2, 10.5)], [(9.0, 12.0), (7.0, 20.0), (8.0, 13.0), (0.1, 30.0)]
    sky = weather.Weather()
    few = timing(sky, busy + still)
    assert few.still(sky) == 3
    assert few.seconds(sky) == [1.0, 1.1, 1.2, 8.0, 9.0]  # and the next stillest, up to 5: not by their own time
    few.extend(timing(sky, still[:2]))
    assert few.still(sky) == 5 and few.calls == 9 and few.seconds(sky) == [1.0, 1.0, 1.1, 1.1, 1.2]
    assert timing(sky, busy[:2]).seconds(sky) == [7.0, 9.0]
    on_gpu = harness.Timing([harness.Batch(2.0), harness.Batch(1.0)])
    assert on_gpu.seconds(sky) == [1.0, 2.0] and on_gpu.still(sky) == 2


def test_a_long_call_is_one_batch_of_which_one_in_still_weather_is_enough():
    made = [sleeper(OURS, 2e-4), sleeper("long", 0.25)]
    job = Job("attention", "a", "float32", "forward", "", lambda options: made)
    timings = job.measure(harness.Options(budget=0.05, memory=False)).timings
    assert [t.lasting for t in timings.values()] == [False, True] and timings["long"].calls == 1
    sky = weather.Weather()
    long, short = timing(sky, [(1.0, 20.0), (2.0, 10.0)]), timing(sky, [(1.0, 10.0)] * 5)
    long.lasting = True
    assert long.seconds(sky) == [2.0]
    measured = Measurement(job, 1, {OURS: short, "long": long}, {"long"}, None)
    assert measured.is_still(sky) and not any(r.is_restless for r in measured.records(sky))
    long.batches.pop()
    assert not measured.is_still(sky) and [r.is_restless for r in measured.records(sky)] == [False, True]


def sleeper(name, seconds):
    return harness.Contender(name, lambda: time.sleep(seconds))


def test_a_long_call_far_behind_is_not_measured_on():
    made = [sleeper(OURS, 2e-3), sleeper("near", 5e-3), sleeper("far", 0.05), sleeper("brief", 2e-3)]
    job = Job("attention", "a", "float32", "forward", "", lambda options: made)
    sky = weather.Weather()
    sky.add(1, 10.0)
    rows = {OURS: (2.0, 10.0), "near": (5.0, 10.0), "far": (7.0, 99.0), "brief": (7.0, 10.0)}
    timings = {name: timing(sky, [row] * 5) for name, row in rows.items()}
    for name in ("near", "far"):
        timings[name].lasting = True
    measured = Measurement(job, 1, timings, {"near", "far", "brief"}, None)
    assert measured.far_behind() == {"far"} and measured.is_still(sky)
    later = job.measure(harness.Options(budget=1e-3, memory=False), measured.far_behind())
    measured.extend(later)
    assert set(later.timings) == set(rows) - {"far"} and len(timings["far"].batches) == 5 < len(timings["near"].batches)


def test_weather_is_judged_by_the_usual_best():
    sky = weather.Weather()
    accident = sky.add(2, 1.0)
    usual = [sky.add(2, 2.0) for _ in range(200)]
    slow, other = sky.add(2, 4.0), sky.add(1, 8.0)
    assert sky.speed(accident) == 2 and sky.speed(usual[0]) == 1 and sky.speed(slow) == 0.5
    assert sky.speed(other) == 1  # of another number of threads
    assert sky.probe().seconds > 0


def test_probes_are_made_with_the_threads_of_the_contender(threads):
    threads(2)
    options = harness.Options(budget=1e-3, memory=False)
    contenders = [harness.Contender(str(n), lambda: None, lambda n=n: torch.set_num_threads(n)) for n in (2, 1)]
    for name, measured in harness.measure(contenders, options).items():
        assert {batch.probe.threads for batch in measured.batches} == {int(name)}


def test_cases_that_met_a_busy_machine_are_measured_on():
    speeds = {"a": [10.0, 9.0], "b": [20.0, 18.0, 10.5], "c": [30.0, 40.0, 35.0]}
    runs = []

    @dataclasses.dataclass(frozen=True)
    class Fixed(Job):
        def measure(self, options, without):
            runs.append(self.case)
            assert not without and options.memory == (runs.count(self.case) == 1)
            probe = speeds[self.case][runs.count(self.case) - 1]
            batches = [(float(len(runs)), probe)] * weather.ENOUGH
            timings = {name: timing(options.weather, batches) for name in (OURS, "other")}
            return Measurement(self, 1, timings, {"other"}, ceilings.Ceilings("float32", 1, len(runs), 1.0, 1.0))

    floor = Floor(fma=12.0)
    jobs = [Fixed("attention", case, "float32", "forward", "", lambda options: [], floor) for case in speeds]
    console = Console(file=io.StringIO())
    options = argparse.Namespace(threads=1, budget=0.1, compile=False, device="cpu", passes=3)
    records, failed = bench.measure(console, jobs, options)
    assert runs == ["a", "b", "c", "b", "c", "b", "c"] and not failed
    assert [(r.case, r.contender, r.median_us / 1e6, r.batches, r.still_batches) for r in records] == [
        ("a", OURS, 1.0, 5, 5), ("a", "other", 1.0, 5, 5), ("b", OURS, 6.0, 15, 5), ("b", "other", 6.0, 15, 5),
        ("c", OURS, 3.0, 15, 0), ("c", "other", 3.0, 15, 0),
    ]  # fmt: skip
    assert records[2].percent_of_fma == pytest.approx(100 * 12 / 6 / 6.0)  # the highest ceiling: the last one's


@pytest.fixture
def interruptible():
    """What a shell has started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("at", "kept", "missing"), [(1, "ab", "c"), (4, "abc", "")])
def test_an_interrupt_keeps_what_was_measured(at, kept, missing, how, capsys):
    runs, before = [], signal.getsignal(signal.SIGTERM)

    @dataclasses.dataclass(frozen=True)
    class Fixed(Job):
        def measure(self, options, without):
            runs.append(self.case)
            if len(runs) > at + 1:
                signal.raise_signal(how)
            timings = {OURS: timing(options.weather, [(1.0, 10.0 + len(runs))] * 2)}
            return Measurement(self, 1, timings, set(), None)

    jobs = [Fixed("attention", case, "float32", "forward", "", lambda options: []) for case in "abc"]
    options = argparse.Namespace(threads=1, budget=0.1, compile=False, device="cpu", passes=3)
    records, failed = bench.measure(Console(), jobs, options)
    assert [r.case for r in records] == list(kept) and list(failed) == [job.name for job in jobs if job.case in missing]
    assert f"interrupted after {len(kept)} of 3 cases" in capsys.readouterr().out
    at, runs = -1, []
    with pytest.raises(KeyboardInterrupt):
        bench.measure(Console(), jobs, options)
    assert signal.getsignal(signal.SIGTERM) is before
