"""Replacing the modules of a whole model in place, and putting the stock ones back.

A module becomes a fused one by its __class__: the object, and with it its parameters, hooks, flags and all references
to it, stays. What has to be known to undo that is kept in the object itself, so that it survives copying and pickling.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import modules as ours

_RESIDUAL_OPTIONS = {"dropout": 0.0, "return_residual": False, "residual_dtype": None}
# torch's class -> (ours, attributes that its objects have beside torch's)
_OF_TORCH = {
    nn.MultiheadAttention: (ours.MultiheadAttention, {}),
    nn.TransformerEncoderLayer: (ours.TransformerEncoderLayer, {}),
    nn.TransformerEncoder: (ours.TransformerEncoder, {}),
    nn.TransformerDecoderLayer: (ours.TransformerDecoderLayer, {}),
    nn.TransformerDecoder: (ours.TransformerDecoder, {}),
    nn.Transformer: (ours.Transformer, {}),
    nn.Linear: (ours.Linear, {}),
    nn.Dropout: (ours.Dropout, {}),
    nn.LayerNorm: (ours.ResidualLayerNorm, _RESIDUAL_OPTIONS),
    nn.RMSNorm: (ours.ResidualRMSNorm, _RESIDUAL_OPTIONS),
    nn.CrossEntropyLoss: (ours.CrossEntropyLoss, {}),
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # since torch 2.13
    _OF_TORCH[nn.LinearCrossEntropyLoss] = (ours.LinearCrossEntropyLoss, {})
_UNDO = "_tformer_ext_undo"
_LOGITS = "logits in training", "a loss without logits"
_LOSS = "_loss_function"  # of a model, if it is not the one that transformers has for its class

# class of torch, by name so that nothing is imported for it -> (what such a model is, what to do instead)
_WRAPPERS = {
    "OptimizedModule": ("a compiled model", "pass the original one (model._orig_mod), then compile it again"),
    "DistributedDataParallel": ("a DistributedDataParallel", "pass model.module, or call this before wrapping"),
    "DataParallel": ("a DataParallel", "pass model.module, or call this before wrapping"),
    "FullyShardedDataParallel": ("a FullyShardedDataParallel", "call this before wrapping"),
    "FSDPModule": ("a model that fully_shard has changed", "call this before fully_shard"),
    "ScriptModule": ("a scripted or traced model", "call this before torch.jit.script or torch.jit.trace"),
}


@dataclass(frozen=True)
class Replacement:
    """One line of a Report. name: qualified name in the model. now: None if it was left, and then why says why."""

    name: str
    was: str
    now: str | None = None
    why: str = ""


@dataclass(frozen=True)
class Report:
    """What was done to a model: `swapped` and `left` modules, as Replacements. str() gives a table of both."""

    swapped: tuple[Replacement, ...]
    left: tuple[Replacement, ...]

    def __str__(self):
        lines = [f"{len(self.swapped)} swapped, {len(self.left)} left"]
        for title, rows in (("now", self.swapped), ("left because", self.left)):
            groups = Counter((row.was, row.now or row.why) for row in rows)
            first = {(row.was, row.now or row.why): row.name or "(model)" for row in reversed(rows)}
            table = [("was", title, "count", "first")]
            table += [(*key, str(count), first[key]) for key, count in groups.items()]
            if rows:
                widths = [max(len(row[column]) for row in table) for column in range(4)]
                lines += ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
                          for row in table]  # fmt: skip
        return "\n".join(lines)


@dataclass
class _Undo:
    """What a module was and has become: classes, attributes added and changed, attention before by config, losses."""

    stock: type
    fused: type
    added: tuple[str, ...] = ()
    changed: dict = field(default_factory=dict)
    attention: list = field(default_factory=list)
    loss: tuple | None = None
    drops_logits: bool = False

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.attention:  # the model that is being loaded asks transformers for our attention by its name
            from .huggingface import register

            register()


def replace_modules(model, filter_fn=None, keep_logits=True):
    """Puts the fused modules in the place of all modules of a model that have one. Returns a Report.

    Covered are torch.nn's MultiheadAttention, Transformer and its parts, Linear, Dropout, LayerNorm, RMSNorm,
    CrossEntropyLoss and LinearCrossEntropyLoss, the exact classes only, and in transformers' models the attention
    (attn_implementation becomes "tformer_ext"), the loss_function of language models (tformer_ext.huggingface.losses),
    RMSNorms, the residual blocks of BERT, GPT and Llama and their relatives, and Conv1D and the GELU of GPT-2
    (tformer_ext.huggingface.blocks).

    Works in place: the objects, their parameters, buffers, hooks and flags stay the same, so that optimizers,
    state_dicts and tied weights stay valid. A second call finds nothing more to do. restore_modules undoes all of it.

    Args:
        model: a torch.nn.Module, before torch.compile, DistributedDataParallel, FSDP and the like.
        filter_fn: filter_fn(module, qualified name) -> bool says whether a module that could be replaced is; for the
            attention of a transformers model it is asked about the model.
        keep_logits: False lets transformers' models that are in training and given labels take their loss without the
            logits (tformer_ext.huggingface.logits): these are None in what forward returns, unless the model itself
            reads them. All other calls are as before.

    Raises:
        TypeError: filter_fn is no function, keep_logits no bool, or model is not a module or has been compiled,
            wrapped, scripted or traced; nothing was changed then.
    """
    _check(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: expected a function of (module, name) or None, got {type(filter_fn).__name__}")
    if not isinstance(keep_logits, bool):
        raise TypeError(f"keep_logits: expected a bool, got {type(keep_logits).__name__}")
    rows = _switch_attention(model, filter_fn) + _switch_losses(model, filter_fn)
    if not keep_logits:
        rows += _drop_logits(model, filter_fn)
    for name, module in model.named_modules():
        row = _replace(module, name, filter_fn)
        if row is not None:
            rows.append(row)
    rows += _forbid_nested(model)
    return _report(rows)


def restore_modules(model):
    """Undoes replace_modules: every module has its class and its attributes again, every config its attention.

    model: what replace_modules was called on, a copy or a part of it. Returns a Report. Raises TypeError as there, and
    where a module has got another class since (torch.nn.utils.parametrize); nothing was changed then.
    """
    _check(model)
    replaced = [(name, m, m.__dict__[_UNDO]) for name, m in model.named_modules() if _UNDO in m.__dict__]
    for name, module, undo in replaced:
        if type(module) is not undo.fused:
            raise TypeError(
                f"model: expected {name or 'it'} to be a {_class_name(undo.fused)} as replace_modules left it, got a "
                f"{_class_name(type(module))}; undo what has changed it first"
            )
    rows = []
    for name, module, undo in replaced:
        if type(module) is not undo.stock:
            rows.append(Replacement(name, _class_name(type(module)), _class_name(undo.stock)))
        if undo.loss is not None and module.__dict__.get(_LOSS) is undo.loss[1]:  # else it has got another one since
            rows.append(_loss_row(name, *reversed(undo.loss)))
            delattr(module, _LOSS)
        if undo.drops_logits:
            from .huggingface.logits import remove

            remove(module)
            rows.append(Replacement(name, *reversed(_LOGITS)))
        module.__class__ = undo.stock
        for attribute in (*undo.added, _UNDO):
            delattr(module, attribute)
        for attribute, value in undo.changed.items():
            rows.append(_changed_row(name, attribute, getattr(module, attribute), value))
            setattr(module, attribute, value)
        for config, before in undo.attention:
            rows.append(_changed_row(name, "attn_implementation", config._attn_implementation, before))
            config._attn_implementation = before
    return _report(rows)


def _report(rows):
    return Report(tuple(row for row in rows if row.now), tuple(row for row in rows if not row.now))


def _changed_row(name, attribute, before, after):
    return Replacement(name, f"{attribute}={before!r}", f"{attribute}={after!r}")


def _class_name(cls):
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__.split('.')[0]} {cls.__qualname__}"


def _check(model):
    """Raises TypeError for what cannot be changed in place any more."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        kinds = [c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.")]
        if getattr(module, "_compiled_call_impl", None) is not None:
            kinds.append("OptimizedModule")
        for kind in kinds:
            if kind in _WRAPPERS:
                what, instead = _WRAPPERS[kind]
                where = f", in {name}" if name else ""
                raise TypeError(f"model: expected one with ordinary modules, got {what}{where}; {instead}")


def _undo_of(module):
    """The module's record, made when it is first changed."""
    if _UNDO not in module.__dict__:
        setattr(module, _UNDO, _Undo(type(module), type(module)))
    return module.__dict__[_UNDO]


def _replace(module, name, filter_fn):
    """A Replacement for this module, or None where it is none of our business."""
    stock = type(module)
    fused, added = _OF_TORCH.get(stock, (None, {}))
    why = None
    if fused is None and "transformers" in sys.modules:
        from .huggingface.blocks import fused_class

        fused = fused_class(stock)
        why = fused.why_not(module) if hasattr(fused, "why_not") else None
    if fused is None:
        why = _why_unknown(module)
        return None if why is None else Replacement(name, _class_name(stock), why=why)
    if "forward" in module.__dict__:
        why = "its forward was set on the object"
    elif why is None and filter_fn is not None and not filter_fn(module, name):
        why = "filter_fn"
    if why is not None:
        return Replacement(name, _class_name(stock), why=why)
    undo = _undo_of(module)
    undo.added, undo.fused = tuple(added), fused
    module.__class__ = fused
    for attribute, value in added.items():
        setattr(module, attribute, value)
    return Replacement(name, _class_name(stock), _class_name(fused))


def _why_unknown(module):
    """Why a module that looks like one of those covered is left, or None."""
    cls = type(module)
    if cls in (kind for kind, _ in _OF_TORCH.values()) or cls.__module__ == f"{__package__}.huggingface.blocks":
        return "replaced already"
    if cls is NonDynamicallyQuantizableLinear:  # MultiheadAttention's own, which is no call of its own in ours
        return None
    for kind in _OF_TORCH:
        if isinstance(module, kind):
            return f"a subclass of torch.nn.{kind.__name__} may compute something else"
    if cls.__name__.endswith(("RMSNorm", "LayerNorm")):
        return "no fused form of this class is known"
    return None


def _forbid_nested(model):
    """torch's encoders make nested tensors of padded ones if their layers were torch's when they were built."""
    rows = []
    for name, encoder in model.named_modules():
        if not isinstance(encoder, nn.TransformerEncoder) or not getattr(encoder, "use_nested_tensor", False):
            continue
        if any(_UNDO in module.__dict__ for module in encoder.modules()):
            _undo_of(encoder).changed["use_nested_tensor"] = True
            encoder.use_nested_tensor = False
            rows.append(_changed_row(name, "use_nested_tensor", True, False))
    return rows


def _switch_attention(model, filter_fn):
    """attn_implementation of the outermost transformers models, which pass it on to those within."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    rows, done = [], []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(prefix) for prefix in done):
            done.append(f"{name}." if name else "")
            rows += _switch(module, name, filter_fn)
    return rows


def _switch(model, name, filter_fn):
    from .huggingface import NAME, register

    configs = list(_configs(model))
    before = [config._attn_implementation for config in configs]
    was = f"attn_implementation={before[0]!r}"
    if all(implementation == NAME for implementation in before):
        return [Replacement(name, was, why="replaced already")]
    if filter_fn is not None and not filter_fn(model, name):
        return [Replacement(name, was, why="filter_fn")]
    if any(getattr(config, "output_attentions", False) for config in configs):
        return [Replacement(name, was, why="output_attentions=True: only eager holds the weights")]
    register()
    try:
        model.set_attn_implementation(NAME)
    except ValueError as error:
        return [Replacement(name, was, why=str(error))]
    changed = [(c, old) for c, old in zip(configs, before, strict=True) if c._attn_implementation != old]
    if not changed:
        return [Replacement(name, was, why="its attention does not go through transformers' AttentionInterface")]
    undo = _undo_of(model)
    undo.attention += [(c, old) for c, old in changed if not any(c is known for known, _ in undo.attention)]
    return [_changed_row(name, "attn_implementation", old, NAME) for _, old in changed]


def _switch_losses(model, filter_fn):
    """The losses of transformers' language models, which are functions; filter_fn is asked about the model."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    from .huggingface.losses import fused_loss

    rows = []
    for name, module in model.named_modules():
        found = fused_loss(module) if isinstance(module, PreTrainedModel) else None
        if found is None or (filter_fn is not None and not filter_fn(module, name)):
            continue
        _undo_of(module).loss = found
        setattr(module, _LOSS, found[1])
        rows.append(_loss_row(name, *found))
    return rows


def _drop_logits(model, filter_fn):
    """Hooks on transformers' models, outer and inner, whose loss is that of a linear layer's results."""
    found = []
    if "transformers" in sys.modules:
        from transformers import PreTrainedModel

        from .huggingface.logits import install, is_installed, output_layer

        models = ((name, m) for name, m in model.named_modules() if isinstance(m, PreTrainedModel))
        found = [(name, m) for name, m in models if output_layer(m) is not None]
    rows = []
    for name, module in found:
        if is_installed(module):
            rows.append(Replacement(name, _LOGITS[0], why="replaced already"))
        elif filter_fn is not None and not filter_fn(module, name):
            rows.append(Replacement(name, _LOGITS[0], why="filter_fn"))
        else:
            _undo_of(module).drops_logits = True
            install(module)
            rows.append(Replacement(name, *_LOGITS))
    return rows or [
        Replacement("", _LOGITS[0], why="none of transformers' models with labels and a linear output layer")
    ]


def _loss_row(name, before, after):
    return Replacement(name, f"loss_function={before.__name__}", f"loss_function={after.__name__}")


def _configs(model):
    """All configs of a transformers model, each once, outer ones first."""
    from transformers import PreTrainedModel

    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    seen = set()
    while waiting:
        config = waiting.pop(0)
        if id(config) not in seen:
            seen.add(id(config))
            yield config
            inner = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
            waiting += [c for c in inner if c is not None]
