"""Compiles tformer_ext._C: the operators, CPU kernels once per instruction set, CUDA kernels if asked for.

pyproject.toml holds everything that is not compilation. Environment variables read here:
  TFORMER_CUDA=auto|0|1    compile csrc/cuda? auto: if torch is a CUDA build and a CUDA toolkit is found
  TFORMER_SANITIZE=address,undefined    compile with one or both of these sanitizers
  MAX_JOBS=n               files compiled at a time (default: the number of cores)
  CXX, CFLAGS              the C++ compiler, and flags appended to ours

All objects are edges of one ninja file. setuptools and torch's BuildExtension know a single set of flags per
extension, but here the same source is compiled once per instruction set, each into a folder of its own.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

HOST_SOURCES = [
    "csrc/schema.cpp",
    "csrc/module.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/residual_norm.cpp",
]
KERNEL_SOURCES = ["csrc/cpu/kernels/kernels.cpp"]

# Least capable first, also in the link: of a template instantiated in several objects the linker keeps the
# first copy, which must be one that every CPU can run.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
ISA_FLAGS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}

COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra", "-Wno-psabi"]
# FMA contraction, no errno and no traps are free speed. Never -ffast-math: NaN and infinity have a meaning.
KERNEL_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# gcc's own AVX-512 headers set these two off.
QUIET_AVX512_FLAGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
# Only the stable ABI of torch 2.10 may be used, so one binary serves every later torch.
TORCH_MACROS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]

# Folder of .cu files -> the machine code they are compiled to.
CUDA_FLAGS = {
    "csrc/cuda": ["-gencode=arch=compute_80,code=[sm_80,compute_80]"],
    "csrc/cuda/sm90": ["-gencode=arch=compute_90a,code=sm_90a"],
}
SANITIZERS = ("address", "undefined")


def sanitizers_from_environment():
    """The list of sanitizers asked for by TFORMER_SANITIZE."""
    names = [name for name in os.environ.get("TFORMER_SANITIZE", "").split(",") if name]
    for name in names:
        if name not in SANITIZERS:
            raise SystemExit(f"TFORMER_SANITIZE: expected some of {','.join(SANITIZERS)}, got {name!r}")
    return names


def cuda_toolkit_from_environment():
    """The folder of the CUDA toolkit to compile csrc/cuda with, or None for a build without CUDA."""
    setting = os.environ.get("TFORMER_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"TFORMER_CUDA: expected auto, 0 or 1, got {setting!r}")
    if setting == "0":
        return None
    if not any((ROOT / "csrc/cuda").rglob("*.cu")):
        if setting == "1":
            raise SystemExit("TFORMER_CUDA=1: this version contains no CUDA sources (csrc/cuda/*.cu)")
        return None
    home = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    found = all((home / file).is_file() for file in ("include/cuda_runtime.h", "bin/nvcc"))
    if setting == "1":
        if not found:
            raise SystemExit(f"TFORMER_CUDA=1: {home} is no CUDA toolkit (no cuda_runtime.h, nvcc); set CUDA_HOME")
        return home
    import torch

    return home if found and torch.version.cuda else None


def git_commit():
    """The commit being built, with "-dirty" if files differ from it; None outside a git checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def find_ninja():
    """Path of the ninja program: the PyPI package's, whose folder need not be on PATH, else the system's."""
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        return shutil.which("ninja") or sys.exit("tformer_ext needs ninja to compile: pip install ninja")


def include_flags(torch):
    """Where pybind11's, torch's and Python's headers are; -isystem: warnings in them are not ours to fix."""
    try:
        import pybind11

        first = ["-isystem", pybind11.get_include()]
    except ImportError:
        first = []  # torch bundles an older copy
    torch_include = Path(torch.__file__).parent / "include"
    return [*first, "-isystem", torch_include, "-isystem", sysconfig.get_paths()["include"]]


def relative_sources(pattern):
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))


class Compiler:
    """The C++ compiler, and which flags it knows."""

    def __init__(self):
        self.command = shlex.split(os.environ.get("CXX", "c++"))
        if shutil.which(self.command[0]) is None:
            raise SystemExit(f"tformer_ext needs a C++17 compiler: {self.command[0]!r} is not on PATH (set CXX)")

    def accepts(self, flags):
        """Whether the compiler knows these flags (an unknown warning is only an error with -Werror)."""
        command = [*self.command, "-Werror", *flags, "-E", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def isa_flags(self):
        """Flags of every instruction set that this machine's family has and the compiler can target."""
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        chosen = {}
        for isa, flags in ISA_FLAGS.items():
            if not flags or (is_x86 and self.accepts(flags)):
                quiet = QUIET_AVX512_FLAGS if "avx512" in isa and self.accepts(QUIET_AVX512_FLAGS) else []
                chosen[isa] = [*flags, *quiet]
            elif is_x86:
                print(
                    f"tformer_ext: the compiler does not know {' '.join(flags)}; leaving {isa} out",
                    file=sys.stderr,
                )
        return chosen


class NinjaFile:
    """Text of a build.ninja: objects, each compiled by its own command, and a shared library made of them."""

    def __init__(self, folder):
        self.folder = folder
        self.lines = [
            "ninja_required_version = 1.3",
            "rule compile",
            "  command = $run -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $what",
            "rule link",
            "  command = $run $in $libraries -o $out",
            "  description = link $out",
        ]

    def compile(self, group, sources, command):
        """Adds one object per source (a path below ROOT) in a folder named after the group; returns them."""
        objects = []
        for source in map(Path, sources):
            target = self.folder / group / source.with_suffix(".o")
            self.lines.append(f"build {_escape(target)}: compile {_escape(ROOT / source)}")
            self.lines.append(f"  run = {_shell(command)}")
            self.lines.append(f"  what = {source} ({group})")
            objects.append(target)
        return objects

    def link(self, target, objects, command, libraries):
        """Adds the shared library made of these objects, in this order."""
        self.lines.append(f"build {_escape(target)}: link {' '.join(map(_escape, objects))}")
        self.lines.append(f"  run = {_shell(command)}")
        self.lines.append(f"  libraries = {_shell(libraries)}")

    def run(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        sys.stdout.flush()  # ninja writes to the same descriptor
        try:
            subprocess.run([find_ninja(), "-C", str(self.folder), "-j", jobs], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit("tformer_ext: compilation failed, the compiler's messages are above") from None


def _escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _shell(command):
    return shlex.join(map(str, command)).replace("$", "$$")


class Build(build_ext):
    """build_ext that compiles the extension with one ninja file in a folder kept between builds."""

    def finalize_options(self):
        super().finalize_options()
        self.sanitizers = sanitizers_from_environment()
        self.cuda_toolkit = cuda_toolkit_from_environment()

    def build_extension(self, ext):
        import torch

        folder = self.build_folder(torch)
        ninja = NinjaFile(folder)
        compiler = Compiler()
        isa_flags = compiler.isa_flags()
        debug = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"] if self.sanitizers else []
        debug += [f"-fsanitize={name}" for name in self.sanitizers]
        # The last of two contradicting flags wins: the sanitizers' over ours, the user's over both.
        last = [*debug, *shlex.split(os.environ.get("CFLAGS", ""))]
        command = [*compiler.command, *COMMON_FLAGS, f"-I{ROOT}/csrc"]
        host = [*command, "-O2", *TORCH_MACROS, *include_flags(torch), *last]
        host.append(f"-DTFORMER_FOR_EACH_ISA(X)={' '.join(f'X({isa})' for isa in isa_flags)}")
        if self.cuda_toolkit:
            host += ["-DUSE_CUDA", f"-I{self.cuda_toolkit}/include"]

        kernels = []  # named first because they take longest, linked last
        for isa, flags in isa_flags.items():
            flags = [*KERNEL_FLAGS, *flags, f"-DTFORMER_ISA={isa}", *last]
            kernels += ninja.compile(isa, KERNEL_SOURCES, [*command, *flags])
        cuda, libraries = self.add_cuda(ninja, host) if self.cuda_toolkit else ([], [])
        info = self.write_build_info(folder, torch, isa_flags, last)
        objects = ninja.compile("host", [*HOST_SOURCES, info.relative_to(ROOT)], host)
        # Nothing of libtorch.so itself is used, but needing it lets the loader find what is in libtorch_cuda.
        torch_libraries = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        libraries += [f"-L{Path(torch.__file__).parent}/lib", *torch_libraries]
        ninja.link(folder / "_C.so", objects + kernels + cuda, [*compiler.command, "-shared", *last], libraries)
        ninja.run()
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(target))
        self.copy_file(str(folder / "_C.so"), target)

    def build_folder(self, torch):
        """A folder per Python, torch and sanitizer: switching between them keeps each one's objects."""
        parts = [sys.implementation.cache_tag, f"torch{torch.__version__}", *self.sanitizers]
        if Path(torch.__file__).is_relative_to(tempfile.gettempdir()):
            parts.append("isolated")  # pip's throw-away environment: its paths, and so all commands, differ every time
        return ROOT / "build" / "-".join(parts)

    def add_cuda(self, ninja, host):
        """Adds csrc/cuda: kernels by nvcc, operators by the host compiler. Returns (objects, libraries)."""
        nvcc = [f"{self.cuda_toolkit}/bin/nvcc", "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        objects = ninja.compile("cuda", relative_sources("csrc/cuda/*.cpp"), host)
        for folder, flags in CUDA_FLAGS.items():
            command = [*nvcc, f"-I{ROOT}/csrc", *flags]
            objects += ninja.compile("cuda", relative_sources(f"{folder}/*.cu"), command)
        # Static: a shared cudart would tie us to one CUDA major version and break imports under a CPU torch.
        return objects, [f"-L{self.cuda_toolkit}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    def write_build_info(self, folder, torch, isa_flags, last):
        """Writes the C++ file behind _C.build_info(); returns its path. Kept unchanged if nothing changed."""
        info = {
            "version": self.distribution.get_version(),
            "commit": git_commit(),
            "torch": torch.__version__,
            "cuda": self.cuda_toolkit is not None,
            "sanitize": self.sanitizers,
            "flags": {isa: " ".join([*KERNEL_FLAGS, *flags, *last]) for isa, flags in isa_flags.items()},
        }
        text = "namespace tformer {\nextern const char* const build_info_json;\n"
        text += f'const char* const build_info_json = R"json({json.dumps(info, indent=1)})json";\n'
        text += "}  // namespace tformer\n"
        path = folder / "build_info.cpp"
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return path


# The sources are listed for sdist tools only; Build compiles them in its own way.
setup(ext_modules=[Extension("tformer_ext._C", HOST_SOURCES + KERNEL_SOURCES)], cmdclass={"build_ext": Build})
