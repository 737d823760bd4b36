"""The examples of the README run as they stand there."""

from pathlib import Path

import pytest
from markdown import broken_links, python_blocks, run_block

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = python_blocks(README) if README.exists() else []


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number):
    line, code = EXAMPLES[number]
    if "transformers" in code:
        pytest.importorskip("transformers", minversion="5")
    names = {}
    run_block(README, line, code, names)
    results = [value for name, value in names.items() if name in ("out", "y", "model")]
    assert len(results) == 1


def test_there_are_examples():
    assert len(EXAMPLES) == 4


def test_relative_links_lead_somewhere():
    assert README.read_text(encoding="utf-8").count("](") > 3 and not broken_links(README)
