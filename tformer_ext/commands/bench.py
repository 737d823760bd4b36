"""`python -m tformer_ext bench`: attention, norms, layers and whole models against the stock ones, in turn.

Prints tables and the project's bars, writes a CSV file and plots.
"""

import argparse
import importlib.util
import re
import signal
import sys
from pathlib import Path

import torch

NEEDED = ("rich", "matplotlib")
RESULTS = Path("benchmarks/results")


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen jobs; 0, or 1 where none was chosen or --against found something slower."""
    parser = argparse.ArgumentParser(prog="python -m tformer_ext bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small cases, under a minute")
    parser.add_argument("--filter", metavar="REGEX", help="only jobs whose group/case/dtype/direction matches")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"folder of the files ({RESULTS}, or here)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of ours")
    parser.add_argument("--budget", type=float, default=0.6, metavar="SECONDS", help="for each contender of a job")
    passes = "measure cases on that met a busy machine, in so many passes in all"
    parser.add_argument("--passes", type=int, default=3, metavar="N", help=passes)
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the eager chain too")
    parser.add_argument("--against", type=Path, metavar="CSV", help="an older run: list what got slower, what faster")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels to time")
    parser.add_argument("--no-plots", action="store_true", help="write no PNG files")
    options = parser.parse_args(argv)
    check(parser, options)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f'bench needs {", ".join(missing)}: pip install "tformer-ext[bench]"', file=sys.stderr)
        return 2
    return run(options)


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exits with a message that names the option."""
    try:
        re.compile(options.filter or "")
    except re.error as error:
        parser.error(f"--filter: expected a regular expression, got {options.filter!r}: {error}")
    if options.threads < 1:
        parser.error(f"--threads: expected 1 or more, got {options.threads}")
    if not options.budget > 0:
        parser.error(f"--budget: expected seconds above 0, got {options.budget}")
    if options.passes < 1:
        parser.error(f"--passes: expected 1 or more, got {options.passes}")
    if options.against and not options.against.is_file():
        parser.error(f"--against: expected a CSV file of an older run, got {options.against}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda was chosen, but torch finds no GPU")
    options.output = options.output or (RESULTS if RESULTS.is_dir() else Path())
    if not options.output.is_dir():
        parser.error(f"--output: expected a folder that exists, got {options.output}")


def run(options: argparse.Namespace) -> int:
    """Measures, prints, writes."""
    # Imported only now, after the check for what they import themselves.
    from rich.console import Console

    from tformer_ext import _C
    from tformer_ext.bench import accuracy, files, gpu, plots, tables
    from tformer_ext.bench.bars import bars

    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 160)
    try:
        old = files.read_csv(options.against)[1] if options.against else []
    except ValueError as error:
        print(f"--against: {error}", file=sys.stderr)
        return 2
    jobs = chosen_jobs(options)
    if importlib.util.find_spec("transformers") is None and options.device == "cpu":
        print("whole models are left out: transformers is not installed", file=sys.stderr)
    if not jobs:
        print(f"--filter: no job matches {options.filter!r}", file=sys.stderr)
        return 1
    on_gpu = options.device == "cuda"
    about = files.machine(options.threads) | (gpu.about() if on_gpu else {})
    records, failed = measure(console, jobs, options)
    judged = [] if on_gpu else bars(records, native_bf16=_C.cpu_isa() == "avx512bf16")
    changed = files.changes(old, records)
    if options.json:
        print(files.as_json(about, records, judged))
    else:
        for key, value in about.items():
            console.print(f"{key:>12}  {value}", highlight=False)
        tables.print_cases(console, records)
        if on_gpu:
            gpu.print_summary(console, records)
        else:
            tables.print_errors(console, accuracy.errors())
            tables.print_bars(console, judged, records)
        if options.against:
            tables.print_changes(console, changed, options.against.name)
    words = (
        [about["gpu"], *([gpu.SM90A] if about["attention"] == gpu.SM90A else [])]
        if on_gpu
        else [about["cpu"], about["isa"]]
    )
    stem = re.sub(r"[^a-z0-9]+", "-", " ".join([*words, about["date"][:10]]).lower()).strip("-")
    written = [options.output / f"{stem}.csv"]
    files.write_csv(written[0], about, records)
    if not options.no_plots:
        written += plots.save(options.output, stem, records)
    for path in written:
        console.print(f"written: {path}", soft_wrap=True, highlight=False)
    for job, error in failed.items():
        print(f"{job} could not be measured: {error!r}", file=sys.stderr)
    return 1 if failed or any(ratio > 1 for _, ratio in changed) else 0


def chosen_jobs(options: argparse.Namespace) -> list:
    """All jobs, those that --quick and --filter leave."""
    from tformer_ext.bench import attention, cross_entropy, gpu, linear, models, modules, norms, small

    if options.device == "cuda":
        jobs = list(gpu.jobs())
    else:
        jobs = [*attention.jobs(), *norms.jobs(), *modules.jobs(), *linear.jobs(), *cross_entropy.jobs()]
        jobs += [*models.jobs(), *small.overhead_jobs(), *small.scaling_jobs()]
    if options.quick:
        jobs = [job for job in jobs if "quick" in job.tags.split()]
    return [job for job in jobs if re.search(options.filter or "", job.name)]


def measure(console, jobs: list, options: argparse.Namespace) -> tuple[list, dict[str, BaseException]]:
    """The records of all jobs, with a progress bar; and what went wrong with a job, so that the others are not lost.

    Jobs that saw too little still weather are measured on in the next pass, minutes later. An interrupt (Ctrl-C, or
    SIGTERM, which a process in the background is not deaf to) ends the measuring, and what there is so far counts.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tformer_ext.bench.harness import Options

    before = torch.get_num_threads()
    settings = Options(threads=options.threads, budget=options.budget, compile=options.compile, device=options.device)
    found, failed = {}, {}
    on_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            chosen = jobs
            for n in range(options.passes):
                task = progress.add_task("", total=len(chosen))
                settings.memory = n == 0  # an amount does not depend on the weather
                for job in chosen:
                    progress.update(task, description=f"{job.name}{f', pass {n + 1}' if n else ''}")
                    torch.set_num_threads(options.threads)
                    try:
                        earlier = found.get(job.name)
                        measured = job.measure(settings, earlier.far_behind() if earlier else ())
                    except Exception as error:
                        failed[job.name] = error
                    else:
                        if earlier:
                            earlier.extend(measured)
                        else:
                            found[job.name] = measured
                    progress.advance(task)
                progress.remove_task(task)
                ok = [job for job in chosen if job.name not in failed]
                chosen = [job for job in ok if not found[job.name].is_still(settings.weather)]
    except KeyboardInterrupt as interrupt:
        if not found:
            raise
        console.print(f"interrupted after {len(found)} of {len(jobs)} cases, in pass {n + 1}")
        failed |= {job.name: interrupt for job in jobs if job.name not in found}
    finally:
        torch.set_num_threads(before)
        signal.signal(signal.SIGTERM, on_sigterm)
    return [record for job in jobs if job.name in found for record in found[job.name].records(settings.weather)], failed
