"""Training steps of transformers' models that take their loss without logits (replace_modules with keep_logits=False).

While such a model's forward runs, its output layer returns DeferredLogits. A loss takes them as they are; whatever else
reads them gets the logits, which are computed then. When forward returns, those that only a loss has read are None.
"""

import functools
import inspect

import torch
from torch.utils._pytree import tree_map

from ..functional import _autocast
from ..modules.linear import is_plain_linear, linear
from ..ops.linear_cross_entropy import plain_linear_cross_entropy


class _Layer:
    """A linear layer's operands, and its results once somebody has asked for them. are_read: by more than a loss."""

    def __init__(self, x, weight, bias):
        self.x, self.weight, self.bias, self.are_read = x, weight, bias, False

    @functools.cached_property
    def logits(self):
        return linear(self.x, self.weight, self.bias)


class DeferredLogits(torch.Tensor):
    """Logits (..., V) that are not computed: a linear layer's results, as a shape and a dtype."""

    @staticmethod
    def __new__(cls, layer, shape, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=layer.x.device)

    def __init__(self, layer, shape, dtype):
        self.layer = layer

    def compute(self, is_read=True):
        """A plain tensor."""
        self.layer.are_read |= is_read
        return self.layer.logits.to(self.dtype).view(self.shape)

    def loss(self, target, ignore_index, reduction, label_smoothing=0.0, divisor=None):
        """As `plain_linear_cross_entropy`, of logits (M, V); None where it is to be taken of computed ones."""
        layer = self.layer
        if "logits" in vars(layer):
            return None
        rows = layer.x.reshape(-1, layer.x.shape[-1])
        operands = rows, layer.weight, layer.bias, target, ignore_index, reduction, label_smoothing, divisor
        return plain_linear_cross_entropy(*operands)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _TAKEN and isinstance(args[0], cls):
            result = _TAKEN[func](*args, **kwargs)
            if result is not None:
                return result
        args, kwargs = tree_map(lambda t: t.compute() if isinstance(t, cls) else t, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func}: logits that are deferred have no memory; call it through torch's functions")


def _viewed(logits, *shape, **options):
    """Rows in another shape, of which V is still the last; None for any other."""
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if options or not all(isinstance(size, int) for size in shape) or shape[-1:] != logits.shape[-1:]:
        return None
    try:
        rows = torch.empty(logits.shape[:-1], device="meta").view(shape[:-1]).shape
    except RuntimeError:
        return None
    return DeferredLogits(logits.layer, (*rows, shape[-1]), logits.dtype)


def _widened(logits, **options):
    """In float32, in which losses are taken anyway; None where that would be narrower."""
    is_other = options or logits.dtype == torch.float64
    return None if is_other else DeferredLogits(logits.layer, logits.shape, torch.float32)


def _same(logits, **options):
    return None if options else logits


def _with_bias(logits, other, **options):
    """Plus what is the same for all rows; None for any other sum."""
    layer, dtype, V = logits.layer, logits.dtype, logits.shape[-1]
    is_vector = isinstance(other, torch.Tensor) and other.dim() > 0 and other.numel() == other.shape[-1] == V
    if options or not is_vector or not other.dtype == dtype == layer.x.dtype or other.dim() > logits.dim():
        return None
    bias = other.reshape(-1) if layer.bias is None else layer.bias + other.reshape(-1)
    return DeferredLogits(_Layer(layer.x, layer.weight, bias), logits.shape, dtype)


def _cross_entropy(
    logits,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    if logits.dim() == 2 and weight is size_average is reduce is None:
        loss = logits.loss(target, ignore_index, reduction, label_smoothing)
        if loss is not None:
            return loss if torch.is_autocast_enabled("cpu") else loss.to(logits.dtype)
    operands = target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    return torch.nn.functional.cross_entropy(logits.compute(is_read=False), *operands)


# what asks for no numbers
_ABOUT = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.is_contiguous,
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
}
_TAKEN = {
    torch.Tensor.view: _viewed,
    torch.Tensor.reshape: _viewed,
    torch.Tensor.contiguous: _same,
    torch.Tensor.float: _widened,
    torch.Tensor.add: _with_bias,
    torch.Tensor.__add__: _with_bias,
    torch.nn.functional.cross_entropy: _cross_entropy,
}


def output_layer(model):
    """The module whose results a transformers model's loss is taken of, if it is a plain linear layer, else None."""
    try:
        layer = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return layer if layer is not None and is_plain_linear(layer) and "labels" in _parameters(type(model)) else None


def install(model):
    """Lets model's training steps do without logits; model has an output_layer."""
    model.register_forward_pre_hook(before_forward, with_kwargs=True)
    model.register_forward_hook(after_forward, always_call=True)


def is_installed(model):
    return before_forward in model._forward_pre_hooks.values()


def remove(model):
    """Undoes install."""
    for hooks, own, others in (
        (model._forward_pre_hooks, before_forward, [model._forward_pre_hooks_with_kwargs]),
        (model._forward_hooks, after_forward, [model._forward_hooks_always_called]),
    ):
        for key in [key for key, hook in hooks.items() if hook is own]:
            for table in (hooks, *others):
                table.pop(key, None)


def before_forward(model, args, kwargs):
    """Hook: in training, with labels, the output layer defers."""
    if not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    if _labels_of(type(model), args, kwargs) is not None and (layer := output_layer(model)) is not None:
        layer.forward = functools.partial(_defer, layer, model)


def after_forward(model, args, output):
    """Hook: the output layer computes again; logits that nobody has read leave. An inner model's are its outer's."""
    layer = model.get_output_embeddings()
    deferring = vars(layer).get("forward") if layer is not None else None
    if getattr(deferring, "func", None) is not _defer or deferring.args[1] is not model:
        return None
    del layer.forward
    if isinstance(output, tuple):
        return tuple(_seen(value) for value in output)
    return None if output is None else type(output)(**{name: _seen(value) for name, value in output.items()})


def _defer(layer, model, input):
    """layer.forward meanwhile."""
    x, weight, bias = _autocast(input, layer.weight, layer.bias)
    if x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return linear(x, weight, bias)
    return DeferredLogits(_Layer(x, weight, bias), (*x.shape[:-1], len(weight)), x.dtype)


def _seen(value):
    if not isinstance(value, DeferredLogits):
        return value
    return value.compute() if value.layer.are_read else None


def _labels_of(kind, args, kwargs):
    if "labels" in kwargs:
        return kwargs["labels"]
    place = _parameters(kind).index("labels") - 1
    return args[place] if place < len(args) else None


@functools.cache
def _parameters(kind):
    return list(inspect.signature(kind.forward).parameters)
