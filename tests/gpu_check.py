"""Everything that only a GPU can tell, in one go: `make gpu-check`.

Builds for the present GPU, runs the tests marked cuda, compute-sanitizer on small calls where there is one, then the
benchmark; its CSV file goes to benchmarks/results. On sm_90 the attention tests, the sanitizer and the benchmark of
attention run once more with TFORMER_EXT_SM90=0, which leaves the portable kernels, into a CSV file of their own. Ends
with 1 where a step failed; the later steps run all the same.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck")
PORTABLE = {"TFORMER_EXT_SM90": "0"}
STEPS = ("build", "tests", "sanitizer", "bench", "portable-tests", "portable-sanitizer", "portable-bench")
# Small enough for racecheck, which slows a kernel down a hundredfold.
SANITIZED = "tests/sanitized_calls.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.15, metavar="SECONDS", help="of the benchmark's contenders")
    parser.add_argument("--skip", nargs="*", default=[], choices=STEPS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch finds no GPU here")
    sm90 = torch.cuda.get_device_capability() == (9, 0)
    steps = {
        "build": build,
        "tests": run_tests,
        # racecheck knows no copy engine
        "sanitizer": lambda: sanitize(*SANITIZERS[:1] if sm90 else SANITIZERS),
        "bench": lambda: bench(options.budget),
    }
    if sm90:
        steps |= {
            "portable-tests": lambda: run_tests(r"attention_kernels[,)]|gradients_on_a_gpu", **PORTABLE),
            "portable-sanitizer": lambda: sanitize(*SANITIZERS, **PORTABLE),
            "portable-bench": lambda: bench(options.budget, "--filter", "^attention", **PORTABLE),
        }
    outcomes = {}
    for name, step in steps.items():
        if name in options.skip:
            outcomes[name] = "left out"
            continue
        print(f"== {name}", flush=True)
        begin = time.monotonic()
        outcomes[name] = f"{step()}, {time.monotonic() - begin:.0f} s"
        if name == "build" and not outcomes[name].startswith("passed"):
            break
    print("== gpu-check on", torch.cuda.get_device_name())
    for name, outcome in outcomes.items():
        print(f"{name:>14}  {outcome}")
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


def run(*command: str, **environment: str) -> str:
    """How it went: "passed" or "FAILED"."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment}, check=False)
    return "FAILED" if result.returncode else "passed"


def build() -> str:
    major, minor = torch.cuda.get_device_capability()
    settings = {"TFORMER_CUDA": "1", "TFORMER_CUDA_ARCHS": f"{major}{minor}"}
    return run(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", **settings)


def run_tests(marks: str = r"[ (](attention_)?kernels[,)]|mark\.cuda", **environment: str) -> str:
    """Only the files with such tests: what the others import need not be there."""
    marked = re.compile(marks)
    files = [
        str(f.relative_to(ROOT)) for f in sorted((ROOT / "tests").glob("test_*.py")) if marked.search(f.read_text())
    ]
    return run(sys.executable, "-m", "pytest", "-q", "-m", "cuda", *files, **environment)


def sanitize(*tools: str, **environment: str) -> str:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return "left out: there is no compute-sanitizer"
    # torch's own kernels are not looked at, where this version has a way to say so
    for choice in (["--kernel-name", "kns=tformer"], []):
        command = [tool, "--tool", "memcheck", *choice, sys.executable, "-c", "import torch; torch.ones(1).cuda()"]
        trial = subprocess.run(command, capture_output=True, text=True, check=False)
        if "ERROR SUMMARY: 0 errors" in trial.stdout:
            break
    else:
        return f"left out: compute-sanitizer does not work here: {(trial.stdout + trial.stderr).strip()[-200:]}"
    outcomes = []
    for sanitizer in tools:
        outcomes.append(
            run(tool, "--tool", sanitizer, "--error-exitcode", "1", *choice,
                sys.executable, SANITIZED, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **environment)
        )  # fmt: skip
    return "passed" if set(outcomes) == {"passed"} else "FAILED"


def bench(budget: float, *more: str, **environment: str) -> str:
    arguments = ("--device", "cuda", "--budget", str(budget), "--compile", "--no-plots", *more)
    return run(sys.executable, "-m", "tformer_ext", "bench", *arguments, **environment)


if __name__ == "__main__":
    sys.exit(main())
