"""How an autograd Function is called: not at all where nothing is recorded, and without detours elsewhere."""

import sys

import torch


def is_dtensor(t):
    """Whether t is a DTensor, without the import of torch.distributed.tensor, which takes long."""
    if type(t) is torch.Tensor or t is None:
        return False
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(t, tensor.DTensor)


def needs_function(*tensors):
    """True if autograd records one of the tensors (or None), or a transform of torch.func is at work."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_eager():
    """Whether operands go to a Function as they are: nothing traces the call, no transform of torch.func wraps it."""
    return torch._C._functorch.peek_interpreter_stack() is None and not torch.compiler.is_compiling()


def eager_apply(function):
    """function.apply for eager calls: past its binding of the operands to forward's signature, which takes longer than
    a small kernel (75 microseconds for 17 operands) and changes nothing where all are given.
    """
    return super(torch.autograd.Function, function).apply


def call(function, *operands):
    """function.apply, by the short way where that is the same."""
    return (eager_apply(function) if is_eager() else function.apply)(*operands)


def call_backward(function, *operands):
    """As call, for a Function of gradients, which is recorded only where their gradients are wanted (create_graph)."""
    if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return call(function, *operands)
    return function.forward(*operands)
