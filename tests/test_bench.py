"""The benchmark itself: what it counts, how it takes turns, what its files and bars say."""

import argparse
import dataclasses
import json
import statistics
import time
from itertools import pairwise

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console

from tformer_ext.bench import (
    accuracy,
    attention,
    bars,
    ceilings,
    cross_entropy,
    files,
    gpu,
    harness,
    linear,
    models,
    modules,
    norms,
    small,
    tables,
)
from tformer_ext.bench.job import COPY, OURS, Floor, Job
from tformer_ext.bench.record import Record, best_peer, by_case
from tformer_ext.commands import bench


def record(case="B4 H12 S512 D64", contender=OURS, median_us=100.0, **fields):
    """A record of the attention grid unless told otherwise."""
    values = {
        "group": "attention", "case": case, "dtype": "float32", "direction": "forward", "contender": contender,
        "is_peer": contender != OURS, "tags": "grid S512 D64", "threads": 2, "median_us": median_us,
        "low_us": median_us, "high_us": median_us, "calls": 3, "ratio_to_ours": median_us / 100.0,
    }  # fmt: skip
    return Record(**{**values, **fields})


def test_contenders_take_turns():
    order = []

    def contender(name):
        def call():
            order.append(name)
            torch.ones(200_000).sum()  # long enough to be timed one call at a time

        return harness.Contender(name, call)

    options = harness.Options(budget=0.02, memory=False)
    timings = harness.measure([contender("a"), contender("b")], options)
    assert set(timings) == {"a", "b"}
    assert all(len(timing.batches) >= 3 and timing.seconds(options.weather)[0] > 0 for timing in timings.values())
    changes = sum(before != after for before, after in pairwise(order))
    assert changes > 4  # not all of one, then all of the other


def test_a_short_call_follows_others_of_its_own_kind():
    """It would else find the caches as another contender left them: these take four times as long then."""
    last = None

    def contender(name):
        def call():
            nonlocal last
            time.sleep(1e-3 if last == name else 4e-3)
            last = name

        return harness.Contender(name, call)

    options = harness.Options(budget=0.05, memory=False)
    for timing in harness.measure([contender("a"), contender("b")], options).values():
        assert statistics.median(batch.seconds for batch in timing.batches) < 3e-3
        assert timing.calls == 4 * len(timing.batches)


def test_a_long_call_follows_whoever_was_before():
    contender = harness.Contender("long", lambda: time.sleep(4e-3))
    (timing,) = harness.measure([contender], harness.Options(budget=0.014, memory=False)).values()
    assert timing.calls == len(timing.batches) == 3


def test_a_peer_that_cannot_run_is_left_out():
    def refuses():
        raise RuntimeError("no such backend")

    fine, broken = harness.Contender("fine", lambda: None), harness.Contender("broken", refuses)
    options = harness.Options(budget=0.005, memory=False)
    assert set(harness.measure([fine, broken], options)) == {"fine"}
    with pytest.raises(RuntimeError, match="no such backend"):
        harness.measure([broken, fine], options)


def test_extra_bytes_are_those_beyond_the_results(capfd):
    keeps = harness.Contender("keeps", lambda: torch.empty(1 << 20))
    wastes = harness.Contender("wastes", lambda: (torch.empty(1 << 20), torch.empty(1 << 18).sum())[0])
    assert harness.extra_bytes(keeps) == 0
    assert harness.extra_bytes(wastes) >= 4 << 18
    assert capfd.readouterr().err == ""


def test_pairs_are_those_of_the_mask():
    for problem in (
        attention.Problem(3, 2, 20, 8),
        attention.Problem(3, 2, 20, 8, causal=True),
        attention.Problem(3, 2, 20, 8, causal=True, window=5),
        attention.Problem(3, 2, 20, 8, padding=0.5),
        attention.Problem(3, 4, 10, 8, keys=30, key_heads=2),
    ):
        mask = attention._mask(problem)
        seen = torch.ones(problem.B, problem.H, problem.S, problem.Sk, dtype=torch.bool)
        seen &= seen.tril() if problem.causal else seen
        seen &= seen if mask is None else mask
        assert problem.pairs() == seen.sum(), str(problem)


def test_floors():
    problem = attention.Problem(2, 3, 10, 8)
    assert problem.floor("forward", 2) == Floor(fma=600 * 32, exp=600, bytes=4 * 960)
    assert problem.floor("backward", 4) == Floor(fma=600 * 80, exp=600, bytes=8 * 1920)
    grouped = attention.Problem(1, 4, 10, 8, key_heads=2, keys=30)
    assert grouped.floor("forward", 4).bytes == 4 * 8 * (2 * 4 * 10 + 2 * 2 * 30)
    assert norms.Problem(10, 20).floor("forward", 2).bytes == 3 * 400
    assert norms.Problem(10, 20, return_residual=True).floor("forward", 4).bytes == 4 * 800
    peaks = ceilings.Ceilings("float32", 1, fma=100.0, exp=10.0, copy=50.0)
    assert Floor(fma=200, exp=30).seconds(peaks) == 5
    assert Floor(fma=200, exp=30, bytes=400).seconds(peaks) == 8
    assert Floor(bytes=400).seconds(peaks, copied=7.5) == 7.5


def test_ceilings_are_measured():
    peaks = ceilings.measure_ceilings(torch.float32, threads=1, seconds=0.005)
    assert peaks.fma > 1e8 and peaks.exp > 1e6 and peaks.copy > 1e7


def contenders_agree(made, tolerance):
    for contender in made:
        if contender.prepare is not None:
            contender.prepare()
    results = {contender.name: contender.call() for contender in made}
    ours = results.pop(OURS)
    ours = ours if isinstance(ours, tuple) else (ours,)
    for name, theirs in results.items():
        for a, b in zip(ours, theirs if isinstance(theirs, tuple) else (theirs,), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "problem",
    [
        attention.Problem(2, 4, 40, 16, causal=True),
        attention.Problem(2, 4, 40, 16, key_heads=2),
        attention.Problem(2, 4, 40, 16, padding=0.5),
        attention.Problem(2, 4, 40, 16, bias=True),
        attention.Problem(2, 4, 40, 16, scale=2.0),
        attention.Problem(2, 4, 40, 16, causal=True, window=7),
    ],
    ids=str,
)
def test_contenders_of_attention_do_the_same_job(problem, direction):
    *made, copy = attention.make_contenders(problem, torch.float32, direction, harness.Options())
    assert [c.name for c in made] == [OURS, "torch SDPA", "SDPA math", "eager"]
    assert copy.name == COPY and 2 * copy.call().nbytes == problem.floor(direction, 4).bytes
    contenders_agree(made, 1e-4)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_contenders_of_norms_do_the_same_job(direction, rms):
    problem = norms.Problem(20, 30, return_residual=True, rms=rms)
    *made, copy = norms.make_contenders(problem, torch.float32, direction, harness.Options())
    assert copy.name == COPY and 2 * copy.call().nbytes == problem.floor(direction, 4).bytes
    contenders_agree(made, 1e-4)


@pytest.mark.parametrize("mode", ["training", "eval"])
@pytest.mark.parametrize("form", [{}, {"padding": 0.5}, {"causal": True}, {"norm_first": True}, {"activation": "gelu"}])
def test_contenders_of_modules_do_the_same_job(form, mode):
    problem = modules.Problem(2, 20, 16, 2, 32, **form)
    made = modules.make_contenders(problem, torch.float32, mode, harness.Options(), dropout=0.0)
    assert [c.name for c in made] == [OURS, modules.STOCK]
    contenders_agree(made, 1e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_contenders_of_linear_do_the_same_job(transposed, monkeypatch):
    monkeypatch.setattr(linear, "last_level_cache", lambda: 1 << 20)
    made = linear.make_contenders(linear.Problem(3, 400, 900, transposed), torch.float32)
    assert [c.name for c in made] == [OURS, linear.STOCK]
    first, *others = (made[0].call() for _ in range(3))
    assert not any(torch.allclose(first, y) for y in others)  # weights of its own each time
    for _ in range(5):
        torch.testing.assert_close(made[0].call(), made[1].call(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contenders_of_cross_entropy_do_the_same_job(dtype, direction):
    made = cross_entropy.make_contenders(cross_entropy.Problem(70, 3000), dtype, direction)
    assert [c.name for c in made] == [OURS, cross_entropy.STOCK, COPY] and not made[2].is_peer
    contenders_agree(made[:2], 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("mode", ["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contenders_of_linear_cross_entropy_do_the_same_job(dtype, mode):
    problem = cross_entropy.Problem(400, 3000)
    made = cross_entropy.make_linear_contenders(problem, dtype, mode)
    assert [c.name for c in made] == [OURS, cross_entropy.STOCK]
    contenders_agree(made, 1e-4 if dtype == torch.float32 else 2e-2)
    assert (
        problem.floor_of_products("training").fma == 3 * problem.floor_of_products("eval").fma == 6 * 400 * 768 * 3000
    )


@pytest.mark.parametrize("problem", models.PROBLEMS, ids=lambda p: f"{p}-{p.modes[-1]}")
def test_contenders_of_models_do_the_same_job(problem):
    pytest.importorskip("transformers")
    tiny = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 37}
    tiny |= {"num_attention_heads": 4, "pad_token_id": 0, "eos_token_id": 2}
    if problem.name == "Llama":
        tiny["num_key_value_heads"] = 2
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    tiny |= dict.fromkeys(names, 0.0)  # it is drawn differently
    small = dataclasses.replace(problem, config=tiny, B=2, S=20)
    for mode in problem.modes:
        made = models.make_contenders(small, torch.float32, mode)
        no_logits = [models.NO_LOGITS] if mode == "training" and "LM" in problem.model else []
        assert [c.name for c in made] == [OURS, models.STOCK, models.ATTENTION, *no_logits]
        assert [c.name for c in made if c.is_peer] == [OURS, models.STOCK]
        if mode == "training":
            expected = made[1].call()
            for contender in made:
                for got, grad in zip(contender.call(), expected, strict=True):
                    assert grad is None or (got - grad).abs().max() <= 1e-4 * max(1, grad.abs().max())
        elif mode == "generate":
            expected = made[1].call()
            assert expected.shape == (2, 20 + models.NEW_TOKENS)
            assert all(torch.equal(c.call(), expected) for c in made)
        else:
            rows = torch.arange(20) < torch.tensor([20, 10 if problem.padding else 20]).view(-1, 1)
            expected = made[1].call()[rows]
            assert all((c.call()[rows] - expected).abs().max() < 1e-4 for c in made)


def test_bars_tell_how_still_it_was(capsys):
    records = [record("a", still_batches=5), record("b", still_batches=9), record("c", still_batches=9)]
    records.append(record("c", "other", still_batches=4))
    records.append(record("a", "other", still_batches=1, enough_batches=1))
    tables.print_bars(Console(), [], records)
    assert "1 of 3 cases" in capsys.readouterr().out
    tables.print_bars(Console(), [], [record(), record("b")])
    assert "cases" not in capsys.readouterr().out
    tables.print_cases(Console(width=160), records)
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "float32" in line]
    assert [row[-2].strip() for row in rows] == ["1", "9", "4"]


def test_bars_of_modules():
    layer = {"group": "modules", "tags": "modules", "direction": "training"}
    records = [record("a", **layer), record("a", modules.STOCK, 130.0, **layer)]
    records += [record("b", **layer), record("b", modules.STOCK, 110.0, **layer)]
    found = verdicts(records)
    bar = found["TransformerEncoderLayer training over torch.nn, float32"]
    assert bar.measured == pytest.approx((1.3 * 1.1) ** 0.5) and bar.holds is False and "lowest 1.10" in bar.detail
    assert found["TransformerEncoderLayer eval over torch.nn, float32"].holds is None


def test_csv_keeps_everything(tmp_path):
    records = [record(percent_of_fma=81.25, extra_bytes=7), record(contender="torch SDPA", median_us=250.0)]
    files.write_csv(tmp_path / "a.csv", {"cpu": "some: thing", "threads": "2"}, records)
    about, read = files.read_csv(tmp_path / "a.csv")
    assert about == {"cpu": "some: thing", "threads": "2"} and read == records


def test_an_older_file_lacks_younger_columns(tmp_path):
    files.write_csv(tmp_path / "a.csv", {}, [record(still_batches=7)])
    head, row = (tmp_path / "a.csv").read_text().splitlines()
    (tmp_path / "a.csv").write_text(head.rsplit(",", 2)[0] + "\n" + row.rsplit(",", 2)[0])
    assert files.read_csv(tmp_path / "a.csv")[1] == [record()]


def test_csv_of_something_else_is_refused(tmp_path):
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns are missing"):
        files.read_csv(tmp_path / "b.csv")


def test_changes_names_what_got_slower():
    old = [record("x"), record("y"), record("z")]
    new = [record("x", median_us=105.0), record("y", median_us=150.0), record("z", median_us=50.0)]
    assert [(r.case, ratio) for r, ratio in files.changes(old, new)] == [("y", 1.5), ("z", 0.5)]


def test_best_peer():
    contenders = {r.contender: r for r in (record(), record(contender="a", median_us=90), record(contender="b"))}
    assert best_peer(contenders).contender == "a"
    assert best_peer({OURS: record()}) is None
    assert list(by_case(contenders.values())) == [record().key]


def verdicts(records, native=True):
    return {bar.name: bar for bar in bars.bars(records, native)}


def test_bars_hold_and_fall_short():
    sdpa = {"contender": attention.SDPA}
    fast = [record(percent_of_fma=90.0), record(**sdpa, median_us=300.0)]
    slow = [record("other", percent_of_fma=40.0), record("other", **sdpa, median_us=75.0)]
    ratio, worst = "attention forward over torch SDPA, grid", "attention, the worst case over its best peer"
    share = "float32 forward, share of FMA peak"
    found = verdicts(fast)
    assert found[ratio].measured == pytest.approx(3.0) and found[ratio].holds
    assert found[worst].holds and found[share].measured == 90.0 and found[share].holds
    found = verdicts(fast + slow)
    assert found[ratio].measured == pytest.approx(1.5) and found[ratio].holds is False
    assert found[worst].measured == 0.75 and found[worst].holds is False and "other" in found[worst].detail
    assert found[share].measured == 40.0 and found[share].holds is False
    assert found["two threads over one"].verdict() == "not measured"


def test_bars_compare_cases():
    base = record()
    found = verdicts([base, record("B4 H12 S512 D64 causal", median_us=70.0)])
    bar = found["causal over full, S >= 512, slowest"]
    assert bar.measured == pytest.approx(0.7) and bar.holds is False
    found = verdicts([base, record("B4 H12 S512 D64 dropout", median_us=130.0)])
    assert found["dropout 0.1 over none, slowest"].holds
    found = verdicts([base, record(dtype="float16", median_us=101.0)])
    assert found["float16 over float32, slowest"].holds is False
    tiny = [record("attention", group="overhead", median_us=8.0)]
    tiny.append(record("attention", "torch SDPA", 5.0, group="overhead"))
    bar = verdicts(tiny)["tiny attention without gradient, longer than torch's by"]
    assert bar.measured == pytest.approx(3.0) and bar.holds is False


def test_bfloat16_share_is_for_native_products_only():
    records = [record(dtype="bfloat16", percent_of_fma=50.0)]
    name = "bfloat16 forward, share of FMA peak"
    assert verdicts(records)[name].holds is False and verdicts(records, native=False)[name].holds is None


def test_errors_are_small_but_measured():
    found = list(accuracy.errors())
    assert {e.dtype for e in found} == {"float32", "bfloat16", "float16"}
    for e in found:
        assert 0 < e.ours <= 2 * e.torch + 8 * torch.finfo(getattr(torch, e.dtype)).eps, e


def test_job_makes_a_record_for_each_contender():
    def contenders(_options):
        return [harness.Contender(OURS, lambda: None), harness.Contender("other", lambda: None)]

    job = Job("g", "c", "float32", "forward", "t", contenders, Floor(fma=1e6, exp=10, bytes=100))
    options = harness.Options(budget=0.005)
    ours, other = job.measure(options).records(options.weather)
    assert ours.batches >= 3 and other.still_batches is not None
    assert not ours.is_peer and other.is_peer and ours.ratio_to_ours == 1
    assert ours.percent_of_floor > 0 and ours.percent_of_fma > 0 and ours.extra_bytes == 0


def test_command_end_to_end(tmp_path, capsys):
    arguments = ["--quick", "--filter", "overhead/layer_norm/float32/forward", "--budget", "0.01", "--threads", "1"]
    arguments += ["--output", str(tmp_path), "--json"]
    assert bench.main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["about"]["threads"] == "1" and told["bars"]
    assert [r["contender"] for r in told["records"]] == [OURS, "torch layer_norm"]
    (file,) = tmp_path.glob("*.csv")
    assert [dataclasses.asdict(r)["contender"] for r in files.read_csv(file)[1]] == [OURS, "torch layer_norm"]


def test_command_prints_tables_and_plots(tmp_path, capsys):
    arguments = ["--filter", "^attention/B8 H12 S128 D64/float32/forward", "--budget", "0.01"]
    assert bench.main([*arguments, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "torch SDPA x" in printed and "share of FMA peak" in printed and "grad query" in printed
    (plot,) = tmp_path.glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads: expected 1 or more, got 0"),
        (["--budget", "0"], "--budget"),
        (["--passes", "0"], "--passes: expected 1 or more, got 0"),
        (["--filter", "("], "--filter: expected a regular expression"),
        (["--against", "no-such.csv"], "--against"),
        (["--output", "no-such-folder"], "--output"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_a_filter_that_matches_nothing_is_an_error(capsys, tmp_path):
    assert bench.main(["--filter", "no such job", "--output", str(tmp_path)]) == 1
    assert "--filter: no job matches" in capsys.readouterr().err


def test_names_of_jobs_are_unique():
    jobs = bench.chosen_jobs(argparse.Namespace(device="cpu", quick=False, filter=None))
    assert len({job.name for job in jobs}) == len(jobs) > 150


def test_whole_models_need_transformers(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else object())
    assert bench.main(["--filter", "^models/", "--output", str(tmp_path)]) == 1
    assert "transformers is not installed" in capsys.readouterr().err


def test_gpu_jobs_are_those_of_the_operations_that_are_there(monkeypatch):
    monkeypatch.setattr(gpu, "has_cuda_kernels", lambda operation: operation == "residual_norm")
    assert {job.group for job in gpu.jobs()} == {"norms"}
    monkeypatch.setattr(gpu, "has_cuda_kernels", lambda operation: True)
    jobs = list(gpu.jobs())
    assert {job.group for job in jobs} == {"norms", "attention"}
    assert len({job.name for job in jobs}) == len(jobs)
    assert all(job.floor.fma > 0 or job.floor.bytes > 0 for job in jobs)


def test_gpu_summary(capsys):
    ours = record(percent_of_floor=40.0)
    peer = record(contender="SDPA cuDNN", median_us=150.0)
    gpu.print_summary(Console(width=120), [ours, peer])
    line = next(line for line in capsys.readouterr().out.splitlines() if "grid" in line)
    assert "1.50" in line and "40" in line


def test_a_backward_is_timed_without_its_forward():
    x, forwards = torch.ones(3, requires_grad=True), []

    def call():
        forwards.append(1)
        return x * x

    backward = attention.contender("ours", call, [x], torch.ones(3), backward=True)
    backward.prepare()
    assert len(forwards) == 1
    assert torch.equal(backward.call()[0], 2 * x)
    backward.prepare()
    assert len(forwards) == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_threads_are_compared(direction):
    options = harness.Options(threads=1, budget=0.001, memory=False)
    contenders = small._threads(attention.Problem(1, 1, 8, 8), "float32", direction)(options)
    assert set(harness.measure(contenders, options)) == {OURS, "one thread"}


def test_a_job_that_fails_does_not_take_the_others_with_it(monkeypatch, tmp_path, capsys):
    jobs = list(small.overhead_jobs())[:2]

    def fail(options):
        raise IndexError("nothing there")

    monkeypatch.setattr(bench, "chosen_jobs", lambda options: [dataclasses.replace(jobs[0], contenders=fail), jobs[1]])
    assert bench.main(["--output", str(tmp_path), "--budget", "0.001", "--no-plots", "--threads", "1"]) == 1
    assert f"{jobs[0].name} could not be measured: IndexError('nothing there')" in capsys.readouterr().err
    (written,) = tmp_path.iterdir()
    assert {r.case for r in files.read_csv(written)[1]} == {jobs[1].case}


def test_first_calls_on_a_gpu_are_not_timed(monkeypatch):
    """They load kernels; one that took longer than its budget would else be all that is timed."""
    taken, head_starts = [9.0, *[1e-3] * 3], []

    def timed(contender, count, options, head_start=0.0):
        head_starts.append(head_start)
        return harness.Batch(taken.pop(0))

    monkeypatch.setattr(harness, "_timed", timed)
    monkeypatch.setattr(harness, "_launch_seconds", lambda contender: 2e-4)
    contender = harness.Contender("slow to begin", lambda: None)
    options = harness.Options(budget=0.1, device="cuda")
    plan = harness._plan(contender, options)
    assert plan.timing.batches == [] and plan.rounds == 25  # of one call that is timed and three that are not
    # the host is ahead by more than what it takes for a call
    assert head_starts[0] == 0 and all(2e-4 < start < 1e-3 for start in head_starts[1:]) and len(head_starts) == 3
    taken = [9.0, *[1e-3] * 3]
    assert harness._plan(contender, harness.Options(budget=0.1)).timing.batches == [harness.Batch(9.0)]
