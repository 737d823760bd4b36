"""Compiles csrc/cuda for the host, against the emulation in this folder, into build/emulation; with ninja, so only what
changed. The library registers the operators tformer_emulated::* for CPU tensors."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIBRARY = ROOT / "build" / "emulation" / f"{sys.implementation.cache_tag}-torch{torch.__version__}" / "emulated.so"

FLAGS = [
    "-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra",
    "-Wno-unknown-pragmas",
    "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA", "-DTFORMER_HOPPER",
    "-DTFORMER_NAMESPACE=tformer_emulated", "-DTFORMER_CUDA_KEY=CPU",
    f"-I{HERE}", f"-I{ROOT / 'csrc/cuda'}",
]  # fmt: skip


def sources() -> list[Path]:
    """Every file of csrc/cuda but those that talk to the CUDA runtime, the schemas, and the emulation itself."""
    cuda = [file for suffix in ("*.cu", "*.cpp") for file in (ROOT / "csrc/cuda").rglob(suffix)]
    cuda = [file for file in cuda if file.name not in ("runtime.cpp", "tensor_map.cpp")]
    return [*sorted(cuda), ROOT / "csrc/schema.cpp", *sorted(HERE.glob("*.cu")), *sorted(HERE.glob("*.cpp"))]


def host_flags() -> list[str]:
    """Multiply-adds in one instruction where this CPU has them: std::fma is slow without."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        words = []
    return ["-mfma"] if "fma" in words and "avx2" in words else []


def build() -> Path:
    """The library, up to date. FileNotFoundError: without ninja or a compiler. RuntimeError: it does not compile."""
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    compiler = cpp_extension.get_cxx_compiler()
    if ninja is None or shutil.which(compiler.split()[0]) is None:
        raise FileNotFoundError("the emulated kernels need ninja and a C++ compiler")
    folder = LIBRARY.parent
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-isystem {path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path} -Wl,-rpath,{path}" for path in cpp_extension.library_paths()]
    lines = [
        "ninja_required_version = 1.3",
        f"flags = {' '.join([*FLAGS, *host_flags(), *includes])}",
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d $flags -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out {' '.join(libraries)} -ltorch_cpu",
    ]
    objects = []
    for source in sources():
        objects.append(str(source.relative_to(ROOT)).replace("/", "_") + ".o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {LIBRARY.name}: link {' '.join(objects)}")
    command = [ninja, "-C", str(folder), *(["-j", jobs] if (jobs := os.environ.get("MAX_JOBS")) else [])]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the emulated kernels do not compile:\n{result.stdout[-4000:]}{result.stderr[-2000:]}")
    return LIBRARY


def build_changed(folder: Path, changes: dict[str, list[tuple[str, str]]], kernel: str) -> Path:
    """The library with changes (old, new) in headers of csrc/cuda and one kernel file compiled with them, in folder."""
    build()
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name, replacements in changes.items():
        header = folder / "csrc/cuda" / name
        for old, new in replacements:
            text = header.read_text()
            assert text.count(old) == 1, f"{old!r} is not there once"
            header.write_text(text.replace(old, new))
    includes = [f"-I{folder / 'csrc/cuda'}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    compiler = cpp_extension.get_cxx_compiler().split()
    changed, target = folder / "changed.o", folder / "emulated.so"
    source = folder / "csrc/cuda" / kernel
    commands = [[*compiler, *FLAGS[:-1], *host_flags(), *includes, "-x", "c++", "-c", source, "-o", changed]]
    name = f"csrc_cuda_{kernel.replace('/', '_')}.o"
    objects = [changed, *(path for path in LIBRARY.parent.glob("*.o") if path.name != name)]
    libraries = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    commands.append([*compiler, "-shared", *objects, "-o", target, *libraries, "-ltorch_cpu"])
    for command in commands:
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
    return target


def build_for_gpu() -> Path:
    """wrapper_kernels.cu as machine code of the present GPU, on sm_90 hopper_kernels.cu too. FileNotFoundError: without
    nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = Path(home, "bin", "nvcc")
    if not nvcc.is_file():
        raise FileNotFoundError(f"needs nvcc, {nvcc} is not there: set CUDA_HOME")
    major, minor = torch.cuda.get_device_capability()
    hopper = (major, minor) == (9, 0)
    arch = "90a" if hopper else f"{major}{minor}"
    library = LIBRARY.with_name(f"wrappers-sm_{arch}.so")
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-shared", "-O2", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{ROOT / 'csrc/cuda'}"]
    files = [HERE / "wrapper_kernels.cu"]
    files += [HERE / "hopper_kernels.cu", ROOT / "csrc/cuda/tensor_map.cpp"] if hopper else []
    result = subprocess.run(list(map(str, [nvcc, *flags, *files, "-o", library])), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the wrappers' kernels do not compile:\n{result.stderr[-4000:]}")
    return library


if __name__ == "__main__":
    print(build())
