"""Code and links in the project's Markdown files."""

import re


def python_blocks(path):
    """[(first line, code)] of the blocks marked as python."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


def run_block(path, line, code, names):
    """Runs a block in these names; errors tell the line in the file."""
    exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)


def broken_links(path):
    """Relative links that lead nowhere."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    return [target for target in targets if "://" not in target and not (path.parent / target).exists()]
