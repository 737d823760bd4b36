"""Between torch and the kernels: one module per op with its fake kernels, vmap rules and autograd Functions."""
