"""Compiles tformer_ext for aarch64 on another machine and runs the tests there in an emulator of that CPU.

`python tests/aarch64.py [arguments of pytest]`. Needs Debian or Ubuntu, root, Python 3.11, 6 GB in build/aarch64 and
what PROGRAMS names. The emulator runs every instruction of the compiled kernels, one by one: it tells right from wrong,
not fast from slow. Tests of the build, of processes, of inductor's compiler and of what the host has are left out.
"""

import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "build" / "aarch64"
SYSTEM, PACKAGES, TREE = HERE / "system", HERE / "packages", HERE / "tree"
PROGRAMS = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
    "debootstrap": "debootstrap",
}
DEBIAN, PYTHON = "bookworm", "3.11"
# torch's libraries ask for these files, and stop without them or with another CPU's.
CPU_FILES = {
    "proc/cpuinfo": "".join(
        f"processor\t: {n}\nFeatures\t: fp asimd fphp asimdhp asimddp i8mm bf16\nCPU implementer\t: 0x41\n"
        "CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: 0xd40\nCPU revision\t: 1\n\n"
        for n in range(2)
    ),
    **{f"sys/devices/system/cpu/cpu{n}/regs/identification/midr_el1": "0x00000000411fd401\n" for n in range(2)},
}
LEFT_OUT = """
build style readme guides examples demo bench bench_weather
distributed_dtensor distributed_guide distributed_ranks distributed_ring distributed_training
emulation emulation_hopper attention_cuda attention_hopper attention_hopper_backward attention_one_pass backward_faults
residual_norm_cuda hopper_code hopper_cuda cuda
""".split()


def find_programs():
    if sys.version_info[:2] != tuple(map(int, PYTHON.split("."))):
        raise SystemExit(f"needs Python {PYTHON}, as {DEBIAN} has, for its headers: make VENV=... PYTHON=... aarch64")
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if missing:
        raise SystemExit(f"needs programs that are not there: apt-get install {' '.join(missing)}")


def make_system():
    """Debian for aarch64, unpacked and not set up: its C library and Python are all that is used."""
    if (SYSTEM / "usr/bin" / f"python{PYTHON}").exists():
        return
    shutil.rmtree(SYSTEM, ignore_errors=True)
    packages = "python3,libgomp1,libstdc++6"
    options = ["--foreign", "--arch=arm64", "--variant=minbase", f"--include={packages}"]
    subprocess.run(["debootstrap", *options, DEBIAN, SYSTEM], check=True)
    for file in sorted((SYSTEM / "var/cache/apt/archives").glob("*.deb")):
        subprocess.run(["dpkg", "-x", file, SYSTEM], check=True)
    for name, text in CPU_FILES.items():
        (SYSTEM / name).parent.mkdir(parents=True, exist_ok=True)
        (SYSTEM / name).write_text(text)


def make_packages():
    """torch, of this Python's version, and what the tests import."""
    if (PACKAGES / "torch").exists():
        return
    shutil.rmtree(PACKAGES, ignore_errors=True)
    version = torch.__version__.partition("+")[0]
    tags = ["any", "manylinux2014_aarch64", *(f"manylinux_2_{n}_aarch64" for n in range(17, 40))]
    options = [word for tag in tags for word in ("--platform", tag)]
    options += ["--python-version", PYTHON, "--only-binary=:all:", "--no-compile", "--quiet"]
    wanted = [f"torch=={version}", "numpy", "pytest", "pytest-timeout", "hypothesis"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", PACKAGES, *wanted], check=True)


def compile_module():
    """setup.py, told that it is on such a machine. torch's headers are the same there; its libraries are not."""
    TREE.mkdir(parents=True, exist_ok=True)
    for name in ("tformer_ext", "tests"):
        shutil.copytree(ROOT / name, TREE / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "pyproject.toml", TREE)
    os.environ |= {"CXX": "aarch64-linux-gnu-g++", "TFORMER_CUDA": "0", "LDSHARED": "aarch64-linux-gnu-gcc -shared"}
    platform.machine = lambda: "aarch64"
    sysconfig.get_config_vars()["EXT_SUFFIX"] = f".cpython-{PYTHON.replace('.', '')}-aarch64-linux-gnu.so"
    sys.implementation.cache_tag += "-aarch64"  # names the folder of objects
    cpp_extension.library_paths = lambda *_: [str(PACKAGES / "torch" / "lib")]
    sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", str(TREE)]
    runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")


def run(arguments):
    environment = os.environ | {
        "PYTHONHOME": str(SYSTEM / "usr"),
        "PYTHONPATH": str(PACKAGES),
        "OMP_WAIT_POLICY": "passive",
    }
    program = ["qemu-aarch64-static", "-L", SYSTEM, SYSTEM / "usr/bin" / f"python{PYTHON}"]
    return subprocess.run([*program, *arguments], cwd=TREE, env=environment, check=False).returncode


def main(tests):
    find_programs()
    make_system()
    make_packages()
    compile_module()
    if run(["-m", "tformer_ext", "selfcheck"]) != 0:
        return 1
    names = sorted(file.stem.removeprefix("test_") for file in (ROOT / "tests").glob("test_*.py"))
    tests = tests or [f"tests/test_{name}.py" for name in names if name not in LEFT_OUT]
    chosen = ["-m", "not slow and not cuda", "-k", "not emulated and not inductor"]
    return run(["-m", "pytest", "-q", "--timeout", "1800", "-p", "no:cacheprovider", *chosen, *tests])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
