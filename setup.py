"""Compiles tformer_ext._C: the operators, CPU kernels once per instruction set, CUDA kernels if asked for.

pyproject.toml holds everything that is not compilation. Environment variables read here:
  TFORMER_CUDA=auto|0|1    compile csrc/cuda? auto: if torch is a CUDA build and a CUDA toolkit is found
  TFORMER_CUDA_ARCHS=80,90+PTX    for which GPUs; +PTX: also what the driver of a newer one compiles itself
  TFORMER_SANITIZE=address,undefined    compile with one or both of these sanitizers
  MAX_JOBS=n               files compiled at a time (default: the number of cores)
  CXX, CFLAGS              the C++ compiler, and flags put before ours

torch's BuildExtension compiles with one set of flags; each further set is a Group here, compiled by the same class into
a folder of its own.
"""

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)  # paths below are relative to it, as setuptools wants them

HOST_SOURCES = [
    "csrc/schema.cpp",
    "csrc/module.cpp",
    "csrc/cpu/block_cache.cpp",
    "csrc/cpu/cache_sizes.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/split.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/residual_norm.cpp",
    "csrc/cpu/linear.cpp",
    "csrc/cpu/cross_entropy.cpp",
]
KERNEL_SOURCES = ["csrc/cpu/kernels/kernels.cpp"]

# Of each family of machines, least capable first, also in the link: of a template instantiated in several objects the
# linker keeps the first copy, which must be one that every CPU can run.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
X86_ISAS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": AVX512BF16,
    "amxbf16": [*AVX512BF16, "-mamx-tile", "-mamx-bf16"],
}
ARM_ISAS = {"baseline": [], "neonbf16": ["-march=armv8.2-a+bf16"]}
ISA_FLAGS = {"x86_64": X86_ISAS, "amd64": X86_ISAS, "aarch64": ARM_ISAS, "arm64": ARM_ISAS}
# An ISA that adds products of bfloat16 to another one has kernels of its own for these only.
ISA_EXTENDS = {"avx512bf16": "avx512", "amxbf16": "avx512bf16", "neonbf16": "baseline"}

COMMON_FLAGS = ["-std=c++17", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Wno-psabi"]
# FMA contraction, no errno and no traps are free speed. Never -ffast-math: NaN and infinity have a meaning.
KERNEL_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"]
# gcc's own AVX-512 headers set these two off.
QUIET_AVX512_FLAGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
# gcc orders a register tile's instructions for NEON so that it runs out of registers for the sums.
UNSCHEDULED_NEON_FLAGS = ["-fno-schedule-insns"]
# Only the stable ABI of torch 2.11 may be used, so one binary serves every later torch.
TORCH_MACROS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]

# constexpr functions of the host's headers may be called in kernels.
CUDA_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "80,90+PTX"
SANITIZERS = ("address", "undefined")


@dataclass
class Group:
    """Sources that are compiled with the same flags, into the folder `name`."""

    name: str
    sources: list[str]
    flags: list[str]


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
    if not any(Path("csrc/cuda").rglob("*.cu")):
        if setting == "1":
            raise SystemExit("TFORMER_CUDA=1: this version contains no CUDA sources (csrc/cuda/*.cu)")
        return None
    home = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    found = all((home / file).is_file() for file in ("include/cuda_runtime.h", "bin/nvcc"))
    if setting == "1":
        if not found:
            raise SystemExit(f"TFORMER_CUDA=1: {home} is no CUDA toolkit (no cuda_runtime.h, nvcc); set CUDA_HOME")
        return home
    return home if found and torch.version.cuda else None


def cuda_archs_from_environment():
    """{machine code: nvcc flag} of the GPUs to compile for: {"sm_80": "-gencode=arch=compute_80,code=sm_80"}, say.

    All comes from the PTX of the oldest GPU, which is compiled once: no source asks for __CUDA_ARCH__, and of what a
    newer one alone has only csrc/cuda/hopper makes use.
    """
    setting, numbers, with_ptx = os.environ.get("TFORMER_CUDA_ARCHS") or CUDA_ARCHS, [], False
    for word in setting.split(","):
        number, plus, ptx = word.strip().partition("+")
        if not number.isdigit() or int(number) < 80 or (plus and ptx != "PTX"):
            raise SystemExit(f"TFORMER_CUDA_ARCHS: expected numbers from 80, like {CUDA_ARCHS}, got {setting!r}")
        numbers.append(int(number))
        with_ptx = with_ptx or bool(plus)
    ptx = f"compute_{min(numbers)}"
    codes = [*(f"sm_{number}" for number in numbers), *([ptx] if with_ptx else [])]
    flags = {code: f"-gencode=arch={ptx},code={code}" for code in codes}
    if "sm_90" in flags:
        flags["sm_90a"] = "-gencode=arch=compute_90a,code=sm_90a"  # for csrc/cuda/hopper, and nothing else
    return flags


def find_ninja():
    """Puts the PyPI package's ninja program on PATH: BuildExtension looks for it there only."""
    try:
        import ninja

        os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", "")
    except ImportError:
        if shutil.which("ninja") is None:
            raise SystemExit("tformer_ext needs ninja to compile: pip install ninja") from None


def find_compiler():
    """The C++ compiler's command."""
    command = shlex.split(cpp_extension.get_cxx_compiler())
    if shutil.which(command[0]) is None:
        raise SystemExit(f"tformer_ext needs a C++17 compiler: {command[0]!r} is not on PATH (set CXX)")
    return command


def compiler_accepts(flags):
    """Whether the compiler knows these flags (an unknown warning is only an error with -Werror)."""
    command = [*find_compiler(), "-Werror", *flags, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def isa_flags():
    """Flags of every instruction set that this machine's family has and the compiler can target."""
    isas, chosen = ISA_FLAGS.get(platform.machine().lower(), {"baseline": []}), {}
    for isa, flags in isas.items():
        if not flags or compiler_accepts(flags):
            more = QUIET_AVX512_FLAGS if "-mavx512f" in flags else (UNSCHEDULED_NEON_FLAGS if isas is ARM_ISAS else [])
            chosen[isa] = [*flags, *(more if compiler_accepts(more) else [])]
        else:
            print(f"tformer_ext: the compiler does not know {' '.join(flags)}; leaving {isa} out", file=sys.stderr)
    return chosen


def system_include_flags():
    """Where pybind11's and torch's headers are; -isystem: warnings in them are not ours to fix."""
    folders = cpp_extension.include_paths()
    try:
        import pybind11

        folders = [pybind11.get_include(), *folders]
    except ImportError:
        pass  # torch bundles an older copy
    return [flag for folder in folders for flag in ("-isystem", folder)]


def git_commit():
    """The commit being built, with "-dirty" if files differ from it; None outside a git checkout."""
    if not Path(".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


class Build(cpp_extension.BuildExtension):
    """BuildExtension with several groups of flags and a folder of objects that is kept between builds.

    A build with CUDA and one without share the objects of kernels; those of the host's files differ.
    """

    def finalize_options(self):
        super().finalize_options()
        self.sanitizers = sanitizers_from_environment()
        self.cuda_toolkit = cuda_toolkit_from_environment()
        self.cuda_archs = cuda_archs_from_environment() if self.cuda_toolkit else {}
        find_compiler()
        parts = [sys.implementation.cache_tag, f"torch{torch.__version__}", *self.sanitizers]
        if Path(torch.__file__).is_relative_to(tempfile.gettempdir()) and not Path(torch.__file__).is_relative_to(ROOT):
            parts.append("isolated")  # pip's throw-away environment: its paths, and so all commands, differ every time
        self.objects = os.path.join("build", "-".join(parts))
        self.build_temp = os.path.join(self.objects, "host-cuda" if self.cuda_toolkit else "host")
        self.force = True  # ninja knows what is up to date, setuptools would not see changed flags

    def build_extension(self, ext):
        isas = isa_flags()
        # -O1 alone does not fuse multiply-adds, and tests would hold the results to the errors of those
        quick = ["-O1", "-fexpensive-optimizations"]
        debug = [*quick, "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"] if self.sanitizers else []
        debug += [f"-fsanitize={name}" for name in self.sanitizers]  # the last of two contradicting flags wins
        host_flags = [*COMMON_FLAGS, "-O2", *TORCH_MACROS, *system_include_flags(), *debug]
        host_flags.append(f"-DTFORMER_FOR_EACH_ISA(X)={' '.join(f'X({isa})' for isa in isas)}")
        groups = []
        for isa, flags in isas.items():
            names = [f"-DTFORMER_ISA={isa}"]
            if isa in ISA_EXTENDS:
                names.append(f"-DTFORMER_EXTENDS={ISA_EXTENDS[isa]}")
            groups.append(Group(isa, KERNEL_SOURCES, [*COMMON_FLAGS, *KERNEL_FLAGS, *flags, *names, *debug]))
        if self.cuda_toolkit:
            host_flags += ["-DUSE_CUDA", "-isystem", f"{self.cuda_toolkit}/include"]
            groups += self.cuda_groups(host_flags)
            # Static: a shared cudart would tie us to one CUDA major version and break imports under a CPU torch.
            ext.extra_link_args += [f"-L{self.cuda_toolkit}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))) as pool:
            longest_first = sorted(reversed(groups), key=lambda group: group.name in ISA_EXTENDS)
            compiled = {group.name: pool.submit(self.compile, group) for group in longest_first}
            for group in groups:
                ext.extra_objects += compiled[group.name].result()
        ext.sources.append(self.write_build_info(isas, debug))
        ext.extra_compile_args = host_flags
        ext.extra_link_args += debug
        super().build_extension(ext)
        if "isolated" not in self.objects:
            self.write_compile_commands()

    def compile(self, group):
        """Objects of a group, compiled by torch's ninja wrapper into a folder of the group's name."""
        folder = os.path.join(self.objects, group.name)
        return self.compiler.compile(
            group.sources, output_dir=folder, include_dirs=[str(ROOT / "csrc")], extra_postargs=list(group.flags)
        )

    def cuda_groups(self, host_flags):
        """csrc/cuda: the kernels by nvcc, those of csrc/cuda/hopper for sm_90a; the operators by the host compiler."""
        cpp_extension.CUDA_HOME = str(self.cuda_toolkit)  # None under a torch without CUDA, which does for compiling
        kernels, operators = (sorted(map(str, Path("csrc/cuda").glob(f"*.{suffix}"))) for suffix in ("cu", "cpp"))
        common = [*CUDA_FLAGS, f"-I{ROOT / 'csrc/cuda'}"]
        if torch.version.cuda is None:
            # Only under a torch with CUDA do its ninja files know the headers of .cu files: here a change of any shows.
            headers = [*Path("csrc/cuda").rglob("*.h"), *Path("csrc").glob("*.h")]
            text = b"".join(file.read_bytes() for file in sorted(headers))
            common.append(f"-DTFORMER_HEADERS={hashlib.sha256(text).hexdigest()[:16]}")
        flags = [*common, *(flag for code, flag in self.cuda_archs.items() if code != "sm_90a")]
        groups = [Group("cuda/kernels", kernels, flags)]
        if "sm_90a" in self.cuda_archs:
            hopper = sorted(map(str, Path("csrc/cuda/hopper").glob("*.cu")))
            groups.append(Group("cuda/sm_90a", hopper, [*common, self.cuda_archs["sm_90a"]]))
            host_flags = [*host_flags, "-DTFORMER_HOPPER"]
        return [*groups, Group("cuda", operators, host_flags)]

    def write_build_info(self, isas, debug):
        """Writes the C++ file behind _C.build_info(); returns its path. Kept unchanged if nothing changed."""
        info = {
            "version": self.distribution.get_version(),
            "commit": git_commit(),
            "torch": torch.__version__,
            "cuda": list(self.cuda_archs),
            "sanitize": self.sanitizers,
            "flags": {isa: " ".join([*KERNEL_FLAGS, *flags, *debug]) for isa, flags in isas.items()},
        }
        text = "namespace tformer {\nextern const char* const build_info_json;\n"
        text += f'const char* const build_info_json = R"json({json.dumps(info, indent=1)})json";\n'
        text += "}  // namespace tformer\n"
        path = Path(self.build_temp, "build_info.cpp")
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(path)

    def write_compile_commands(self):
        """build/compile_commands.json, where clangd and clang-tidy find it: the commands of all groups together."""
        commands = []
        for file in sorted(Path(self.objects).rglob("build.ninja")):
            result = subprocess.run(["ninja", "-C", file.parent, "-t", "compdb"], capture_output=True, check=True)
            commands += json.loads(result.stdout)
        Path("build/compile_commands.json").write_text(json.dumps(commands, indent=1))


find_ninja()
extension = Extension(
    "tformer_ext._C",
    HOST_SOURCES,
    language="c++",
    include_dirs=[str(ROOT / "csrc")],  # ninja runs in another folder
    library_dirs=cpp_extension.library_paths(),
    # Not cpp_extension.CppExtension, which also links torch_python. Nothing of libtorch.so itself is used, but needing
    # it lets the loader find what is in libtorch_cuda.
    extra_link_args=["-Wl,--push-state,--no-as-needed,-ltorch,-ltorch_cpu,--pop-state"],
)
setup(ext_modules=[extension], cmdclass={"build_ext": Build})
