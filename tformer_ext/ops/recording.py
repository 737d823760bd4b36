"""How an autograd Function is called: not at all where nothing is recorded, and without detours elsewhere."""

import sys

import torch
from torch.autograd import forward_ad


def is_dtensor(t):
    """Whether t is a DTensor, without the import of torch.distributed.tensor, which takes long."""
    if type(t) is torch.Tensor or t is None:
        return False
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(t, tensor.DTensor)


# Looked up once: a tiny call takes as long as a few dozen attributes of modules.
is_grad_enabled = torch.is_grad_enabled
_transform = torch._C._functorch.peek_interpreter_stack
_is_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def require_grad(*tensors):
    """Whether one of the tensors (or None) requires a gradient; autograd records that where it is enabled."""
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False


def needs_function(*tensors):
    """True if autograd records one of the tensors (or None), or a transform of torch.func is at work."""
    return (is_grad_enabled() and require_grad(*tensors)) or _transform() is not None


def is_forward_mode():
    """True within forward_ad.dual_level and torch.func.jvp: tangents go where only torch's own operations take them."""
    return forward_ad._current_level >= 0


def is_eager():
    """Whether operands go to a Function as they are: nothing traces the call, no transform of torch.func wraps it."""
    return _transform() is None and not _is_compiling()


def is_plain_call():
    """Whether tensors go to an operator as they are: eager, and without autocast."""
    return not (_is_compiling() or _is_autocast() or is_forward_mode()) and _transform() is None


def is_plain_cpu_tensor(t):
    """Whether t lies on the CPU and nothing but an operator would see it: no subclass, tracing, transform, forward-mode
    derivatives or dispatch mode."""
    return (
        type(t) in _PLAIN
        and t.device.type == "cpu"
        and is_eager()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not is_forward_mode()
    )


def by_short_way(op):
    """The operator without the Python frame of its overload, which does nothing but call it."""
    return getattr(op, "_op", op)


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
