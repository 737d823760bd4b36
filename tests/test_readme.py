"""The examples of the README run as they stand there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL) if README.exists() else []


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number):
    code = EXAMPLES[number]
    if "transformers" in code:
        pytest.importorskip("transformers", minversion="5")
    names = {}
    exec(compile(code, f"README example {number + 1}", "exec"), names)
    results = [value for name, value in names.items() if name in ("out", "y", "model")]
    assert len(results) == 1


def test_there_are_examples():
    assert len(EXAMPLES) == 3


def test_relative_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert targets and all((README.parent / target).exists() for target in targets)
