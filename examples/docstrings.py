"""Real text that is on every machine: the docstrings of the standard library and of installed packages.

Files are parsed, not imported, so nothing of them runs.
"""

import ast
import importlib.util
import re
import sysconfig
from collections import namedtuple
from pathlib import Path

PACKAGES = ("matplotlib", "networkx", "numpy", "scipy", "sklearn", "stdlib", "sympy")
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3", "__pycache__"}

LENGTH_OF_PART = 400  # characters of parameters that come with one question
DEFAULT = re.compile(r"\bdefaults?(?: (?:is|to|value)|[:=])* ?[`'\"]*([\w.+-]+)", re.IGNORECASE)

Docstring = namedtuple("Docstring", "package name text owner", defaults=[""])  # owner: the class of a method
Parameter = namedtuple("Parameter", "name entry type meaning")  # all but the name: (first, last + 1) in the text
Question = namedtuple("Question", "function words text span")  # span: (first, last + 1) character of the answer


def package_folder(package):
    """Where a package's source lies; ends the program with advice if it is not installed."""
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    found = importlib.util.find_spec(package)
    if found is None:
        raise SystemExit(f'{package} is not installed: pip install "tformer-ext[examples]"')
    return Path(found.origin).parent


def python_files(folder):
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in SKIPPED:
            yield from python_files(path)
        elif path.suffix == ".py":
            yield path


def read_docstrings(packages=PACKAGES):
    """A Docstring for each documented function and class; a text that occurs twice is taken once."""
    seen = set()
    for package in packages:
        for path in python_files(package_folder(package)):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):  # templates and files of other Python versions
                continue
            classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
            owners = {member: node.name for node in classes for member in node.body}
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    text = ast.get_docstring(node)
                    if text and text not in seen:
                        seen.add(text)
                        yield Docstring(package, node.name, text, owners.get(node, ""))


def words_of_name(name):
    """'QuadraticDiscriminantAnalysis' and 'read_csv_file' as words in small letters."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()


def without_markup(text):
    """The text on one line, without the marks of reStructuredText."""
    text = re.sub(r":[\w:]+:`~?([^`<]*?)(?: <[^`]*>)?`", r"\1", text)
    return " ".join(re.sub(r"[`*]|(?<=\w)_(?=\s|$)", "", text).split())


def paragraphs(text):
    """The prose of a docstring: no code, no tables, no titles of sections, no directives."""
    for paragraph in re.split(r"\n\s*\n", re.sub(r"\n[^\n]+\n\s*([-=~])\1{2,}(?=\n|$)", "\n", text)):
        if not re.match(r"\s*(>>>|\.\. |\||\+--|@)", paragraph):
            line = without_markup(paragraph)
            if line:
                yield line


def summary_and_rest(docstring):
    """(first sentence, "class, name: remaining prose"), or None where the docstring has no summary of its own."""
    first, *rest = [*paragraphs(docstring.text), ""]
    rest = " ".join(rest).strip()
    if re.fullmatch(r"[A-Z][^.]{15,110}\.", first) and len(rest.split()) >= 12 and len(first.split()) >= 4:
        names = filter(None, map(words_of_name, (docstring.owner, docstring.name)))
        return first, f"{', '.join(names)}: {rest}"
    return None


def parameters(text):
    """The section `Parameters` of a numpydoc docstring and, in it, the spans of each Parameter."""
    section = re.search(r"^Parameters\n-{3,}\n(.*?)(?=\n[^\n]+\n-{3,}(?:\n|$)|\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None:
        return "", []
    text = "\n".join(line.strip() if line[:1].isspace() else line for line in section[1].splitlines())
    entry = re.compile(r"^(\w+) ?: ([^\n]+)\n((?:(?!\w+ ?: |\w+, )[^\n]+\n?)+)", re.MULTILINE)
    found = []
    for match in entry.finditer(text):
        sentence = re.match(r".+?(?:\.(?=\s)|\Z)", match[3].rstrip(), re.DOTALL)
        start = match.start(3)
        found.append(Parameter(match[1], match.span(), match.span(2), (start, start + sentence.end())))
    return text, found


def read_questions(packages):
    """Lists of Questions, a list for each function: type, meaning and, where it is told, default of its parameters.

    A long section is cut between parameters; a question comes with the part that has the answer.
    """
    for docstring in read_docstrings(packages):
        text, found = parameters(docstring.text)
        questions = []
        while found:
            begin = found[0].entry[0]
            part = [p for p in found if p.meaning[1] - begin <= LENGTH_OF_PART] or found[:1]
            end, found = part[-1].entry[1], found[len(part) :]
            for p in part:
                asked = {"What type has": p.type, "What is the meaning of": p.meaning}
                if default := DEFAULT.search(text, p.type[0], p.meaning[1]):
                    asked["What is the default of"] = default.span(1)
                for words, (a, b) in asked.items():
                    question = Question(docstring.name, f"{words} {p.name}?", text[begin:end], (a - begin, b - begin))
                    questions.append(question)
        if questions:
            yield questions
