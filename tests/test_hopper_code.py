"""What the compiler makes of the kernels for sm_90a: facts that decide their speed and that need no GPU to be seen."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc/cuda/hopper"
NVCC = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda", "bin", "nvcc")
FLAGS = ["-c", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]
WIDTHS = (64, 128, 256)
# A tile of keys by head dimension, of which one warp has 16 rows: exponents of a thread, products of q k and of p v.
KEYS = {64: 112, 128: 128, 256: 80}

pytestmark = [
    pytest.mark.skipif(not NVCC.is_file(), reason="needs nvcc: set CUDA_HOME"),
    pytest.mark.skipif(not SOURCES.is_dir(), reason="needs the source tree"),
]


@pytest.fixture(scope="module", params=["bf16", "f16"])
def compiled(request, tmp_path_factory):
    """(object file, what nvcc said)"""
    target = tmp_path_factory.mktemp("hopper") / f"{request.param}.o"
    source = SOURCES / f"attention_forward_{request.param}.cu"
    command = [NVCC, *FLAGS, f"-I{ROOT / 'csrc/cuda'}", source, "-o", target]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target, result.stdout + result.stderr


def test_products_run_by_themselves(compiled):
    """C75xx: ptxas serialises products, or puts waits of its own between them."""
    assert "C75" not in compiled[1], compiled[1]


def test_nothing_is_spilled(compiled):
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled[1])
    assert spills == [("0", "0", "0")] * len(WIDTHS), compiled[1]


def find_cuobjdump() -> tuple[Path, str] | None:
    """It, and a PATH with nvdisasm too: of the toolkit, or of the PyPI packages that the extra `cuda` names."""
    wheels = [str(path) for path in Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin")]
    path = os.pathsep.join([str(NVCC.parent), os.environ.get("PATH", ""), *wheels])
    found = [shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm")]
    return (Path(found[0]), path) if all(found) else None


@pytest.fixture(scope="module")
def machine_code(compiled):
    """width -> instructions, in order."""
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump and nvdisasm")
    command, environment = [tool[0], "-sass", compiled[0]], {**os.environ, "PATH": tool[1]}
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    functions = {}
    for part in text.split("Function : ")[1:]:
        width = int(re.search(r"HopperForwardI\w+?Li(\d+)E", part).group(1))
        functions[width] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*[^;]*);", part)
    assert sorted(functions) == list(WIDTHS)
    return functions


def count(instructions, name):
    return sum(line.startswith(name) for line in instructions)


@pytest.mark.parametrize("width", WIDTHS)
def test_instructions(machine_code, width):
    code = machine_code[width]
    keys, boxes = KEYS[width], width // 64
    # scores twice, the first and the others; values twice, the others and the last
    assert count(code, f"HGMMA.64x{keys}x16") >= 2 * width // 16
    values = count(code, f"HGMMA.64x{min(width, 128)}x16") - (2 * width // 16 if keys == min(width, 128) else 0)
    assert values == 2 * keys // 16 * max(width // 128, 1)
    assert count(code, "UTMALDG.4D") == 3 * boxes
    assert count(code, "USETMAXREG") == 2
    assert not count(code, "LDL") and not count(code, "STL") and not count(code, "HMMA")


@pytest.mark.parametrize("width", WIDTHS)
def test_softmax_runs_beside_a_product(machine_code, width):
    """Between the wait for the scores and that for the values before are all exponents.

    In a straight line ptxas would wait for both at once.
    """
    marks = [line for line in machine_code[width] if line.startswith(("WARPGROUP.DEPBAR", "MUFU.EX2"))]
    waits = [n for n, line in enumerate(marks) if "DEPBAR" in line]
    scores = [n for n, line in enumerate(marks) if line.endswith("0x1 ") or line.endswith("0x1")]
    assert len(scores) == 1
    following = min(n for n in waits if n > scores[0])
    assert following - scores[0] - 1 >= KEYS[width] // 2


@pytest.mark.parametrize("width", WIDTHS)
def test_registers_are_within_what_each_role_has(machine_code, width):
    """After setmaxnreg; nothing but spinning waits lies outside of the two stretches."""
    code = machine_code[width]
    more, fewer = (
        next(n for n, line in enumerate(code) if f"USETMAXREG.{kind}" in line) for kind in ("TRY", "DEALLOC")
    )
    last = max(n for n, line in enumerate(code) if line.startswith("EXIT"))
    assert more < fewer < last
    fetching, multiplying = (32, 160) if width == 64 else (24, 240)

    def highest(lines):
        return max(int(number) for line in lines for number in re.findall(r"\bR(\d+)\b", line))

    assert highest(code[fewer:last]) < fetching
    assert highest(code[more:fewer]) < multiplying
