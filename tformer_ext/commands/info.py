"""`python -m tformer_ext info`: everything about this installation and machine that a bug report needs."""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

from tformer_ext import _C

# Variables whose names begin like this change what runs, or how fast.
ENVIRONMENT_PREFIXES = ("TFORMER_", "OMP_", "KMP_", "GOMP_", "MKL_", "CUDA_", "PYTORCH_", "TORCH_")
COMPANIONS = ("transformers", "sentence-transformers", "numpy")


def main(argv: list[str] | None = None) -> int:
    """Prints collect() as aligned text, or as JSON with --json."""
    parser = argparse.ArgumentParser(prog="python -m tformer_ext info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    information = collect()
    if parser.parse_args(argv).json:
        print(json.dumps(information, indent=2))
    else:
        print(as_text(information))
    return 0


def collect() -> dict[str, dict[str, object]]:
    """Sections of facts, in the order in which they are printed."""
    build = _C.build_info()
    return {
        "tformer_ext": {
            "version": build["version"],
            "commit": build["commit"],
            "location": str(Path(_C.__file__).parent),
        },
        "build": {
            "compiler": build["compiler"],
            "torch": build["torch"],
            "cuda kernels": build["cuda"],
            "sanitizers": build["sanitize"],
            **{f"flags {isa}": flags for isa, flags in build["flags"].items()},
        },
        "cpu": {
            "model": cpu_model(),
            "instruction set": _C.cpu_isa(),
            "supported": _C.supported_isas(),
            "built": _C.built_isas(),
            "caches": cpu_caches(),
            "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
            "threads": torch.get_num_threads(),
        },
        "torch": {
            "version": torch.__version__,
            "commit": torch.version.git_version,
            "cuda": torch.version.cuda,
            "cuda devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "system": {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "platform": platform.platform(),
            **{package: package_version(package) for package in COMPANIONS},
        },
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT_PREFIXES)
        },
    }


def as_text(information: dict[str, dict[str, object]]) -> str:
    """The sections one below the other, values aligned over all of them."""
    width = max(len(key) for section in information.values() for key in section)
    lines = []
    for title, section in information.items():
        lines.append(title)
        for key, value in section.items():
            if isinstance(value, list):
                value = ", ".join(map(str, value)) or "none"
            elif isinstance(value, bool):
                value = "yes" if value else "no"
            lines.append(f"  {key:<{width}}  {'none' if value is None else value}")
        if not section:
            lines.append("  none")
    return "\n".join(lines)


def cpu_model() -> str:
    """The CPU's name as the kernel gives it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cpu_caches() -> list[str]:
    """Data caches of the first core, such as "L1 32K"; empty where the kernel tells none."""
    caches = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            caches.append(f"L{level} {size}")
    return caches


def package_version(name: str) -> str | None:
    """Version of an installed distribution, None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
