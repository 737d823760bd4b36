"""The scripts for torchrun, in the guide and in the README, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "docs" / "train-on-several-machines.md", ROOT / "README.md"]
SCRIPTS = [
    pytest.param(int(ranks), code, id=f"{path.stem}-{number}")
    for path in FILES
    if path.exists()
    for number, (ranks, code) in enumerate(
        re.findall(r"^```python torchrun=(\d+)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    )
]

# Threads of torch's Gloo may still hold a tensor when the interpreter is taken down, which aborts the process, seldom:
# pytorch/pytorch#179291. What is tested has ended by then.
LEAVE = "\nimport os\n\nos._exit(0)\n"

pytestmark = pytest.mark.skipif(not FILES[0].exists(), reason="needs the source tree")


def test_there_are_scripts():
    assert len(SCRIPTS) == 6


@pytest.mark.slow
@pytest.mark.parametrize("ranks, code", SCRIPTS)
def test_script(ranks, code, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(code + LEAVE, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
