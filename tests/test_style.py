"""Rules of the source tree that no linter checks."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = (".py", ".pyi", ".h", ".cpp", ".cu", ".cuh")
TEXT = (*CODE, ".md", ".toml", ".in", ".yml")

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")


def source_files(*suffixes: str) -> list[Path]:
    """Files of the checkout that git tracks or would track; of an unpacked sdist, all but built ones."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        files = [ROOT / name for name in names]
    else:
        hidden = {"build", ".venv", "dist"}
        files = [file for file in ROOT.rglob("*") if not hidden & set(file.relative_to(ROOT).parts)]
    return sorted(file for file in files if file.is_file() and (not suffixes or file.name.endswith(suffixes)))


def lines_with(pattern: str, files: list[Path]) -> list[str]:
    """file:line: text of every line that the pattern matches somewhere."""
    regex = re.compile(pattern)
    return [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if regex.search(line)
    ]


def test_tree_is_found():
    names = {str(file.relative_to(ROOT)) for file in source_files()}
    assert {"setup.py", "csrc/schema.cpp", "tformer_ext/__init__.py"} <= names


def test_files_are_short():
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in source_files(*CODE)}
    assert not {str(file.relative_to(ROOT)): n for file, n in lengths.items() if n > 500}


def test_cpp_lines_are_short():
    assert not lines_with(r"^.{121}", source_files(*CODE[2:]))


def test_python_functions_are_short():
    long = []
    for file in source_files(".py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1 - (ast.get_docstring(node) or "").count("\n")
                if length > 80:
                    long.append(f"{file.relative_to(ROOT)}:{node.lineno}: {node.name} has {length} lines")
    assert not long


def test_kernels_know_nothing_of_torch():
    files = [file for file in source_files(".h", ".cpp") if ROOT / "csrc/cpu/kernels" in file.parents]
    files += [ROOT / f"csrc/{name}.h" for name in ("params", "philox", "key_range")]
    assert len(files) > 3
    assert not lines_with(r"\bat::|\bc10::|#include *[<\"](torch|ATen|c10)/", files)


def test_isa_macros_stay_in_the_vector_headers():
    vector_headers = re.compile(r"csrc/cpu/kernels/vec\w*\.h$")
    files = [file for file in source_files(*CODE[2:]) if not vector_headers.search(file.as_posix())]
    assert not lines_with(r"__AVX|__AMX|__FMA__|__F16C__|__SSE", files)


def test_cuda_sources_are_the_same_for_every_gpu():
    """setup.py makes the machine code of all from one PTX."""
    files = [file for file in source_files(".h", ".cu") if ROOT / "csrc/cuda" in file.parents]
    assert len(files) > 3
    assert not lines_with(r"__CUDA_ARCH", files)


def test_functions_that_only_prefetch_are_inlined():
    """gcc takes them for functions without effects and drops their calls."""
    kernels = [file for file in source_files(".h") if ROOT / "csrc/cpu/kernels" in file.parents]
    definitions = r"^\s*(template <.*> ?)?(static |inline )*TFORMER_INLINE void (pre)?fetch\w*\("
    assert len(lines_with(definitions, kernels)) > 4
    assert not lines_with(r"^\s*(template <.*> ?)?(static |inline )*void (pre)?fetch\w*\(", kernels)


def test_no_loose_ends():
    assert not lines_with(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", source_files(*CODE))


def test_no_paths_of_one_machine():
    home_folders = r"(?<![\w.])/(work|root|home|Users)/"
    this_file = Path(__file__).resolve()
    files = [file for file in source_files(*TEXT, "Makefile", "run") if file != this_file]
    assert not lines_with(home_folders, files)
