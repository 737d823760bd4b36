"""Benchmarks: `python -m tformer_ext bench`. benchmarks/README.md of the source tree says how to read the results."""
