"""The build: what the compiled module refers to, the choice of instruction set, what setup.py accepts."""

import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tformer_ext import _C

ROOT = Path(__file__).resolve().parent.parent
ISAS = ["baseline", "avx2", "avx512", "avx512bf16", "amxbf16", "neonbf16"]
EXTENDING = [
    ("avx512bf16", "avx512", "avx512"),
    ("amxbf16", "avx512bf16", "avx512"),
    ("neonbf16", "baseline", "baseline"),
]

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python in the source tree with these additions to the environment (an empty value takes one away)."""
    merged = {name: value for name, value in (os.environ | environment).items() if value}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=merged, capture_output=True, text=True)


def build_folder() -> Path:
    """Folder of the objects that the module in use was linked from; skips the test where there is none."""
    info = _C.build_info()
    name = "-".join([sys.implementation.cache_tag, f"torch{info['torch']}", *info["sanitize"]])
    builds = ROOT.parent if ROOT.parent.name == "build" else ROOT / "build"  # `make cuda` runs this file in build/cuda
    if not (builds / name).is_dir() or ROOT / "tformer_ext" not in Path(_C.__file__).parents:
        pytest.skip("no build folder of this module: it was installed from elsewhere")
    return builds / name


def symbols(file: Path, *options: str) -> list[str]:
    command = ["nm", "--demangle", *options, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def products(file: Path) -> list[str]:
    """The matrix products in an object. They are never inlined, so that a name is there wherever the code is."""
    return [line for line in symbols(file, "--defined-only") if "register_tile<" in line or "tile_product<" in line]


@needs_nm
def test_module_refers_to_the_stable_abi_only():
    undefined = symbols(Path(_C.__file__), "--dynamic", "--undefined-only")
    assert any("aoti_torch_" in line for line in undefined)
    assert not [line for line in undefined if "at::" in line or "c10::" in line]


@needs_nm
@pytest.mark.parametrize("isa", _C.built_isas())
def test_kernel_objects_define_no_weak_symbols(isa):
    """A weak symbol compiled for AVX-512 could replace the baseline's copy of the same template."""
    if "address" in _C.build_info()["sanitize"]:
        pytest.skip("the address sanitizer adds weak symbols of its own")
    objects = list((build_folder() / isa).rglob("*.o"))
    assert objects
    for file in objects:
        lines = symbols(file, "--defined-only", "--extern-only")
        assert lines, f"{file} exports nothing"
        assert not [line for line in lines if line.split()[1] in "WVu"]


@needs_nm
@pytest.mark.parametrize("isa, extended, whole", EXTENDING)
def test_extending_isas_leave_the_rest_to_another(isa, extended, whole):
    """They refer to its table, and have no products of float64."""
    if isa not in _C.built_isas():
        pytest.skip(f"{isa} is not compiled in")
    (file,) = (build_folder() / isa).rglob("*.o")
    assert any(f"tformer::{extended}::kernels" in line for line in symbols(file, "--undefined-only"))
    (other,) = (build_folder() / whole).rglob("*.o")
    assert products(file)
    assert not [line for line in products(file) if "Wide<double>" in line]
    assert [line for line in products(other) if "Wide<double>" in line]


@needs_sources
def test_headers_are_tracked():
    """ninja's own record of which headers each object was compiled from."""
    ninja = Path(sys.executable).parent / "ninja"
    command = [str(ninja) if ninja.exists() else "ninja", "-t", "deps"]
    if shutil.which(command[0]) is None:
        pytest.skip("needs ninja")
    tracked = set()
    for file in build_folder().rglob("build.ninja"):
        text = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=True).stdout
        tracked |= {line.strip() for line in text.splitlines() if line.startswith("    ")}
    # those of .cu files only torch's ninja files for a torch with CUDA know; setup.py has another way
    headers = {str(file) for file in (ROOT / "csrc").rglob("*.h") if "cuda" not in file.parts}
    assert headers <= tracked


def test_built_isas_are_in_order():
    built = _C.built_isas()
    assert built == [isa for isa in ISAS if isa in built]
    assert built[0] == "baseline"
    if platform.machine() != "x86_64":
        assert built == ["baseline"]
    assert list(_C.build_info()["flags"]) == built


def test_supported_isas_begin_with_the_baseline():
    supported = _C.supported_isas()
    assert supported == _C.built_isas()[: len(supported)]
    assert supported[0] == "baseline"


def test_most_capable_isa_is_the_default():
    result = run_python("-c", "import tformer_ext; print(tformer_ext._C.cpu_isa())", TFORMER_CPU_ISA="")
    assert result.stdout.strip() == _C.supported_isas()[-1], result.stderr


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_environment_forces_an_isa(isa):
    result = run_python("-c", "import tformer_ext; print(tformer_ext._C.cpu_isa())", TFORMER_CPU_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


UNUSABLE = ["sse9", "AVX2", *(isa for isa in ISAS if isa not in _C.supported_isas())]


@pytest.mark.parametrize("isa", UNUSABLE)
def test_environment_with_an_unusable_isa_fails_the_import(isa):
    result = run_python("-c", "import tformer_ext", TFORMER_CPU_ISA=isa)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith(f"ImportError: TFORMER_CPU_ISA: '{isa}' is not ")
    assert message.endswith("expected one of " + ", ".join(_C.supported_isas()))


@pytest.mark.parametrize("split", ["auto", "always", "never", ""])
def test_environment_chooses_whether_to_split(split):
    result = run_python("-c", "import tformer_ext; print(tformer_ext._C.cpu_split())", TFORMER_CPU_SPLIT=split)
    assert result.stdout.strip() == (split or "auto"), result.stderr


def test_a_wrong_choice_whether_to_split():
    result = run_python("-c", "import tformer_ext", TFORMER_CPU_SPLIT="yes")
    message = result.stderr.strip().splitlines()[-1]
    assert message == "ImportError: TFORMER_CPU_SPLIT: 'yes', expected one of auto, always, never"
    before = _C.cpu_split()
    with pytest.raises(ValueError, match="set_cpu_split: 'yes', expected one of auto"):
        _C.set_cpu_split("yes")
    assert _C.cpu_split() == before


@pytest.mark.parametrize("isa", [*UNUSABLE, ""])
def test_set_cpu_isa_refuses_an_unusable_isa(isa):
    before = _C.cpu_isa()
    with pytest.raises(ValueError, match=f"'{isa}' is not .*, expected one of baseline"):
        _C.set_cpu_isa(isa)
    assert _C.cpu_isa() == before


def test_set_cpu_isa_takes_a_string_only():
    with pytest.raises(TypeError):
        _C.set_cpu_isa(2)


def test_set_cpu_isa():
    before = _C.cpu_isa()
    try:
        for isa in _C.supported_isas():
            _C.set_cpu_isa(isa)
            assert _C.cpu_isa() == isa
    finally:
        _C.set_cpu_isa(before)


def has_cuda_sources() -> bool:
    return any((ROOT / "csrc/cuda").rglob("*.cu"))


@needs_sources
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TFORMER_CUDA": "yes"}, "TFORMER_CUDA: expected auto, 0 or 1, got 'yes'"),
        (
            {"TFORMER_SANITIZE": "thread"},
            "expected some of address,undefined, got 'thread'",
        ),
        ({"CXX": "no-such-compiler"}, "'no-such-compiler' is not on PATH"),
    ],
)
def test_setup_refuses_bad_settings(environment, message, tmp_path):
    result = run_python("setup.py", "build_ext", "--build-lib", str(tmp_path), **environment)
    assert result.returncode != 0
    assert message in result.stderr


@needs_sources
@pytest.mark.parametrize("archs", ["70", "ninety", "90+SASS", "80,,90"])
def test_setup_refuses_bad_cuda_archs(archs, tmp_path):
    for file in ("include/cuda_runtime.h", "bin/nvcc"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    environment = {"TFORMER_CUDA": "1", "CUDA_HOME": str(tmp_path), "TFORMER_CUDA_ARCHS": archs}
    result = run_python("setup.py", "build_ext", "--build-lib", str(tmp_path), **environment)
    assert result.returncode != 0
    assert f"TFORMER_CUDA_ARCHS: expected numbers from 80, like 80,90+PTX, got '{archs}'" in result.stderr


needs_cuda_build = pytest.mark.skipif(not _C.build_info()["cuda"], reason="needs a build with CUDA kernels")


@needs_cuda_build
@needs_nm
def test_cuda_build_loads_everywhere():
    """No CUDA library is needed; what only a torch with CUDA has may be missing."""
    needed = subprocess.run(["objdump", "-p", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert not [line for line in needed.splitlines() if "NEEDED" in line and ("cuda" in line or "nv" in line)]
    assert [line for line in symbols(Path(_C.__file__), "--dynamic") if " w aoti_torch_get_current_cuda_stream" in line]
    assert Path(_C.__file__).stat().st_size < 40 << 20


@needs_cuda_build
def test_cuda_build_has_code_for_sm_90a():
    """Of attention's own kernels for it, and of nothing else."""
    archs = _C.build_info()["cuda"]
    assert ("sm_90a" in archs) == ("sm_90" in archs)
    objects = {file.name for file in (build_folder() / "cuda/sm_90a").rglob("*.o")}
    expected = {
        f"attention_{direction}_{dtype}.o" for direction in ("forward", "backward") for dtype in ("bf16", "f16")
    }
    assert objects == (expected if "sm_90a" in archs else set())


@needs_cuda_build
def test_cuda_build_registers_its_operators():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in (
        "_attention_forward",
        "_attention_inference",
        "_attention_refusals",
        "_residual_norm_forward",
        "_residual_norm_inference",
        "_residual_norm_backward",
    ):
        assert has_kernel(f"tformer_ext::{name}", "CUDA")


@needs_sources
def test_setup_refuses_cuda_without_toolkit_or_sources(tmp_path):
    environment = {"TFORMER_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    result = run_python("setup.py", "build_ext", "--build-lib", str(tmp_path), **environment)
    assert result.returncode != 0
    expected = "is no CUDA toolkit" if has_cuda_sources() else "this version contains no CUDA sources"
    assert expected in result.stderr


@needs_sources
def test_sdist_is_complete(tmp_path):
    """Everything in csrc and tests that git would track, and what setup.py itself needs."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build", ".*", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignored)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=tree, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for folder in ("csrc", "tests", "tformer_ext"):
        files = {str(file.relative_to(tree)) for file in (tree / folder).rglob("*") if file.is_file()}
        assert files and files <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile"} <= names
