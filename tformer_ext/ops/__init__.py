"""Between torch and the kernels: one module per op with its fake kernels, vmap rules and autograd Functions."""

from . import flops  # noqa: F401  (registers its formulas)
