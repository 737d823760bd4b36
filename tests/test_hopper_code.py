"""What the compiler makes of the kernels for sm_90a: facts that decide their speed and that need no GPU to be seen."""

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tformer_ext import _C

ROOT = Path(__file__).resolve().parent.parent
NVCC = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda", "bin", "nvcc")
RECORD = ROOT / "nvcc.txt"  # what compilers said
WIDTHS = {"forward": (64, 128, 192, 256), "backward": (64, 128, 256)}
# What a kernel is compiled with, as HopperExtra.
NONE, DROPOUT, BIAS = EXTRAS = range(3)
# Forward: a tile of keys by head dimension, of which one warp has 16 rows: exponents of a thread, products.
WITH_MORE = {64: 128, 128: 128, 192: 64, 256: 64}
KEYS = {NONE: {64: 112, 128: 128, 192: 112, 256: 80}, DROPOUT: WITH_MORE, BIAS: WITH_MORE}
# Backward: a tile of queries, and one of keys.
QUERIES, BACKWARD_KEYS = {64: 128, 128: 64, 256: 64}, {64: 128, 128: 128, 256: 64}
SCORES = {64: 128, 128: 64, 256: 32}  # queries of a warpgroup
REGISTERS = {("forward", 64, NONE): (32, 160)}  # else (24, 240)

pytestmark = pytest.mark.skipif(
    not _C.build_info()["cuda"] or not RECORD.is_file(), reason="needs what `make cuda` leaves of its build"
)


DTYPES = ("bf16", "f16")
EACH = pytest.mark.parametrize("direction, dtype", [(d, t) for d in WIDTHS for t in DTYPES])


def of(direction):
    each = [(t, width, extra) for t in DTYPES for width in WIDTHS[direction] for extra in EXTRAS]
    return pytest.mark.parametrize("dtype, width, extra", each)


@pytest.fixture(scope="module")
def compiled():
    """compiled(direction, dtype): (object file, what nvcc said), as the build made them"""

    @functools.cache
    def find(direction, dtype):
        name = f"attention_{direction}_{dtype}"
        (target,) = ROOT.parent.glob(f"*/cuda/sm_90a/**/{name}.o")
        steps = re.split(r"^\[\d+/\d+\] ", RECORD.read_text(), flags=re.MULTILINE)
        (said,) = (step for step in steps if f"hopper/{name}.cu" in step)
        return target, said

    return find


@EACH
def test_products_run_by_themselves(compiled, direction, dtype):
    """C75xx: ptxas serialises products, or puts waits of its own between them."""
    said = compiled(direction, dtype)[1]
    assert "C75" not in said, said


@EACH
def test_nothing_is_spilled(compiled, direction, dtype):
    said = compiled(direction, dtype)[1]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    kernels = len(WIDTHS[direction]) * (4 if direction == "backward" else 3)  # and one that writes dq
    assert len(spills) == kernels, said
    # backward of width 64 with dropout: two words that are read once a tile; of 256 with a bias: one
    allowed = {("8", "8", "8"), ("8", "4", "4")} if direction == "backward" else set()
    spilled = [spill for spill in spills if spill != ("0", "0", "0")]
    assert len(spilled) == len(set(spilled)) and set(spilled) <= allowed, said


def find_cuobjdump() -> tuple[Path, str] | None:
    """It, and a PATH with nvdisasm too: of the toolkit, or of the PyPI packages that the extra `cuda` names."""
    wheels = [str(path) for path in Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin")]
    path = os.pathsep.join([str(NVCC.parent), os.environ.get("PATH", ""), *wheels])
    found = [shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm")]
    return (Path(found[0]), path) if all(found) else None


@pytest.fixture(scope="module")
def machine_code(compiled):
    """machine_code(direction, dtype): (width, extra) -> instructions, in order"""
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump and nvdisasm")

    @functools.cache
    def disassemble(direction, dtype):
        command, environment = [tool[0], "-sass", compiled(direction, dtype)[0]], {**os.environ, "PATH": tool[1]}
        text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        functions = {}
        for part in text.split("Function : ")[1:]:
            name = part.partition("\n")[0]
            found = re.search(rf"Hopper(Wide)?{direction.capitalize()}I\w+?(?:Li(\d+)E)?L(?:b|\w+ExtraE)([012])E", name)
            if found:
                instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*[^;]*);", part)
                functions[int(found.group(2) or 256), int(found.group(3))] = instructions
        assert sorted(functions) == [(width, extra) for width in WIDTHS[direction] for extra in EXTRAS]
        return functions

    return disassemble


def count(instructions, name):
    return sum(line.startswith(name) for line in instructions)


def waits_of(instructions):
    """[(groups that may still be on their way, exponents since the wait before)], in order."""
    waits, exponents = [], 0
    for line in instructions:
        exponents += line.startswith("MUFU.EX2")
        if line.startswith("WARPGROUP.DEPBAR"):
            waits.append((int(line.split("0x")[1], 16), exponents))
            exponents = 0
    return waits


@of("forward")
def test_instructions(machine_code, dtype, width, extra):
    code = machine_code("forward", dtype)[width, extra]
    keys, boxes = KEYS[extra][width], width // 64
    # scores twice, the first and the others; values twice, the others and the last
    assert count(code, f"HGMMA.64x{keys}x16") >= 2 * width // 16
    columns = [128, width - 128] if width > 128 else [width]  # of products with values
    for each in set(columns):
        values = count(code, f"HGMMA.64x{each}x16") - (2 * width // 16 if keys == each else 0)
        assert values == 2 * keys // 16 * columns.count(each)
    assert count(code, "UTMALDG.4D") == 3 * boxes
    assert count(code, "USETMAXREG") == 2
    assert not count(code, "LDL") and not count(code, "STL") and not count(code, "HMMA")


@of("forward")
def test_softmax_runs_beside_a_product(machine_code, dtype, width, extra):
    """Between the wait for the scores and that for the values before are all exponents.

    In a straight line ptxas would wait for both at once.
    """
    waits = waits_of(machine_code("forward", dtype)[width, extra])
    scores = [n for n, (pending, _) in enumerate(waits) if pending == 1]
    assert len(scores) == 1 and waits[scores[0] + 1][1] >= KEYS[extra][width] // 2


@of("forward")
def test_a_bias_is_read_beside_products(machine_code, dtype, width, extra):
    """Two keys at a time: after the products are handed out, before the wait for the scores."""
    code = machine_code("forward", dtype)[width, extra]
    wait = next(n for n, line in enumerate(code) if line.startswith("WARPGROUP.DEPBAR") and "0x1" in line)
    products = max(n for n, line in enumerate(code[:wait]) if line.startswith("HGMMA"))
    reads = sum(line.startswith("LDG.E R") for line in code[products:wait])
    assert reads == (KEYS[extra][width] // 4 if extra == BIAS else 0)


@of("backward")
def test_instructions_of_backward(machine_code, dtype, width, extra):
    code, queries, boxes = machine_code("backward", dtype)[width, extra], QUERIES[width], width // 64
    times = 2 if width == 256 else 1  # the first scores and the others; the last gradients and the others
    shapes = {32: 0, 64: 0, 128: 0}
    shapes[SCORES[width]] += 2 * width // 16 * times  # scores and dp
    shapes[min(width, 128)] += 2 * queries // 16 * times  # dv and dk
    shapes[64 * times] += BACKWARD_KEYS[width] // 16 * times  # dq
    for columns, expected in shapes.items():
        assert count(code, f"HGMMA.64x{columns}x16") == expected
    assert sum(".tnspA" in line for line in code) == 128 // 16
    assert count(code, "UTMALDG.4D") == 4 * boxes
    assert count(code, "UBLKRED.G.S.ADD.F32") == count(code, "UBLKCP.G.S") == 1
    assert count(code, "USETMAXREG") == 2
    assert count(code, "LDL") + count(code, "STL") <= {(DROPOUT, 64): 4, (BIAS, 256): 2}.get((extra, width), 0)
    assert not count(code, "HMMA")


@of("backward")
def test_a_bias_of_backward(machine_code, dtype, width, extra):
    """Where registers allow it is read before the wait for the scores, the first wait."""
    code = machine_code("backward", dtype)[width, extra]
    wait = next(n for n, line in enumerate(code) if line.startswith("WARPGROUP.DEPBAR") and "0x1" in line)
    products = next(n for n, line in enumerate(code) if line.startswith("HGMMA"))
    assert (count(code[products:wait], "LDG.E.U16") >= 16) == (extra == BIAS and width == 128)


@of("backward")
def test_weights_are_made_beside_a_product(machine_code, dtype, width, extra):
    """The waits for scores, dp, dv and dq, dk; all exponents are between the first two, while dp is on its way.

    Wide: in the loop for dv, dq, dk, scores and dp, the latter two of the next tile.
    """
    exponents = SCORES[width] // 2
    dp = 1 if width == 128 else 0  # narrow: dv begins later
    first, gradients = [(1, 0), (dp, exponents)], [(1, 0), (0, 0)]
    loop = [(3, 0), (2, 0), (2, 0), (1, 0), (0, exponents)] if width == 256 else []
    assert waits_of(machine_code("backward", dtype)[width, extra]) == [*first, *loop, *gradients]


@EACH
def test_registers_are_within_what_each_role_has(machine_code, direction, dtype):
    """After setmaxnreg; nothing but spinning waits lies outside of the two stretches."""
    for (width, extra), code in machine_code(direction, dtype).items():
        more, fewer = (
            next(n for n, line in enumerate(code) if f"USETMAXREG.{kind}" in line) for kind in ("TRY", "DEALLOC")
        )
        last = max(n for n, line in enumerate(code) if line.startswith("EXIT"))
        assert more < fewer < last
        fetching, multiplying = REGISTERS.get((direction, width, extra), (24, 240))

        def highest(lines):
            return max(int(number) for line in lines for number in re.findall(r"\bR(\d+)\b", line))

        assert highest(code[fewer:last]) < fetching
        assert highest(code[more:fewer]) < multiplying
