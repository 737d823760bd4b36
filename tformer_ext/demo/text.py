"""Real text that is on every machine: what the modules of Python's standard library say about themselves."""

import ast
import re
import sys
import sysconfig
from functools import cache
from pathlib import Path


@cache
def module_docstrings() -> dict[str, str]:
    """Name -> docstring of the standard library's public modules, in alphabetical order; none is imported."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for name in sorted(sys.stdlib_module_names):
        file = next((f for f in (folder / f"{name}.py", folder / name / "__init__.py") if f.is_file()), None)
        if name.startswith("_") or file is None:
            continue
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8", errors="replace")))
        if text:
            found[name] = text
    return found


def sentences() -> list[str]:
    """The first paragraph of each module that is a sentence, headed by the module's name."""
    found = []
    for name, text in module_docstrings().items():
        paragraph = re.sub(r"\s+", " ", text.split("\n\n")[0])
        if 3 < len(paragraph.split()) < 60:
            found.append(f"{name}: {paragraph}")
    return found


def characters() -> bytes:
    """All docstrings one after the other, as ASCII."""
    return "\n\n".join(module_docstrings().values()).encode("ascii", errors="ignore")
