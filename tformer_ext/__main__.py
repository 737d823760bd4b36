"""Command line: python -m tformer_ext info | demo | bench | selfcheck."""

import argparse
import importlib
import sys

COMMANDS = {
    "info": "versions, CPU, chosen kernels: what a bug report needs",
    "demo": "the kernels in a real model, compared with stock PyTorch",
    "bench": "benchmarks against PyTorch's own kernels",
    "selfcheck": "compares the kernels with the reference on this machine",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command named first in argv (default: sys.argv) and returns its exit status."""
    lines = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tformer_ext",
        description=f"Commands (each has its own --help):\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed to the command")
    chosen = parser.parse_args(argv)
    # Imported only now: a command may need packages of an extra that the others do without.
    command = importlib.import_module(f"tformer_ext.commands.{chosen.command}")
    return command.main(chosen.arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
