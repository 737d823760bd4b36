"""The masks of transformers as what the kernels skip work by: causal, window, key lengths, padding of keys."""

import functools
import inspect
import sys
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map


class PositionMask(torch.Tensor):
    """A bool mask (B, 1, L, S), True = attend, that positions and padding decide; its elements are made when asked for.

    options: the keywords of functional.attention that mean the same; keys: no query sees a key from this one on. Any
    operation on the mask gives what it gives on the elements. One that changes them in place sets options to None: the
    elements say all from then on.
    """

    @staticmethod
    def __new__(cls, shape, device, options, keys, make):
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.options, mask.keys, mask._make, mask._elements = options, keys, make, None
        return mask

    def elements(self):
        """The mask as an ordinary tensor."""
        if self._elements is None:
            self._elements = self._make()
        return self._elements

    def __repr__(self):
        return f"PositionMask(shape={tuple(self.shape)}, options={self.options}, keys={self.keys})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = tree_map(lambda t: t.elements() if isinstance(t, PositionMask) else t, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        if func._schema.is_mutable:
            for t in (*args, *(kwargs or {}).values()):
                if isinstance(t, PositionMask):
                    t.options = None
            return args[0] if isinstance(args[0], PositionMask) else out
        return out


class Pattern(NamedTuple):
    """Query at position i sees keys j with j <= i if causal, i - j <= left and j - i <= right; -1 = unbounded."""

    causal: bool
    left: int = -1
    right: int = -1

    def __and__(self, other):
        left, right = (max(pair) if min(pair) < 0 else min(pair) for pair in zip(self[1:], other[1:], strict=True))
        return Pattern(self.causal or other.causal, left, right)


EVERYWHERE = Pattern(causal=False)


def attention_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, **more
):
    """transformers' mask function: bool (B, 1, L, S), True = attend, or None where the module's is_causal says it all.

    attention_mask: bool (B, tokens seen), False = padding, or None. The other arguments are transformers'.
    Causal masks, sliding windows and padding become a PositionMask; all other patterns, single queries and what is
    traced are transformers' own masks, padding alone a view that is broadcast over the queries. Models that
    transformers runs with eager attention only add their masks, so theirs are eager's, floating and never None.
    """
    from transformers import masking_utils

    mask_function = masking_utils.causal_mask_function if mask_function is None else mask_function
    knows = knowledge_of(more.get("config"))
    if not knows.is_causal:
        more |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}

    def ordinary(**options):
        make = masking_utils.sdpa_mask if knows.bool_masks else masking_utils.eager_mask
        return make(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **options,
        )

    if (
        not knows.bool_masks
        or more.get("use_vmap")
        or (attention_mask is not None and attention_mask.shape[:-1] != (batch_size,))
    ):
        return ordinary(**more)
    padding = None
    if attention_mask is not None:
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = padding[:, kv_offset : kv_offset + kv_length]
    shape = (batch_size, 1, q_length, kv_length)
    if q_length == 1 or masking_utils.is_tracing(padding) or masking_utils.is_tracing(q_offset):
        if mask_function is masking_utils.bidirectional_mask_function and padding is not None:
            return padding[:, None, None].expand(shape)
        return ordinary(**more)
    pattern = pattern_of(mask_function)
    if pattern is None:
        return ordinary(**more)
    options, keys = _options(pattern, q_length, kv_length, int(q_offset) - kv_offset, padding)
    if options is None:
        return ordinary(**more)
    if options == {"causal": "upper_left"} and more.get("allow_is_causal_skip", True):
        return None
    if options == {} and more.get("allow_is_bidirectional_skip", False):
        return None
    more |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return PositionMask(shape, more.get("device", "cpu"), options, keys, lambda: ordinary(**more))


class Knowledge(NamedTuple):
    """What a model's code knows of masks: other ones than eager's; that without one is_causal says what is seen."""

    bool_masks: bool = True
    is_causal: bool = True


def knowledge_of(config):
    """Of the models of a configuration, by the attention that they say they support."""
    return Knowledge() if config is None else _knowledge_of(type(config))


@torch.compiler.assume_constant_result  # of a plain function, not of one with a cache
def _knowledge_of(config_class):
    module = sys.modules.get(config_class.__module__.replace("configuration_", "modeling_"))
    return Knowledge() if module is None else _knowledge_in(module, config_class)


@functools.cache
def _knowledge_in(module, config_class):
    from transformers import PreTrainedModel

    models = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, PreTrainedModel)]
    models = [c for c in models if c.__module__ == module.__name__]
    models = [c for c in models if c.config_class is config_class] or models
    if not models:
        return Knowledge()
    sdpa = any(c._supports_sdpa for c in models)
    return Knowledge(sdpa or any(c._supports_flash_attn or c._supports_flex_attn for c in models), sdpa)


def pattern_of(mask_function):
    """The Pattern of one of transformers' mask functions, or None for any other."""
    from transformers import masking_utils as m

    if mask_function is m.bidirectional_mask_function:
        return EVERYWHERE
    if mask_function is m.causal_mask_function:
        return Pattern(causal=True)
    code = getattr(mask_function, "__code__", None)
    if code is m.sliding_window_overlay(1).__code__:
        return Pattern(False, left=_held(mask_function, "sliding_window") - 1)
    if code is m.sliding_window_bidirectional_overlay(1).__code__:
        return Pattern(False, *(_held(mask_function, "sliding_window"),) * 2)
    if code is not m.and_masks().__code__:
        return None
    pattern = EVERYWHERE
    for part in map(pattern_of, _held(mask_function, "mask_functions")):
        if part is None:
            return None
        pattern &= part
    return pattern


def _held(function, name):
    """The variable that a nested function holds under this name."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _options(pattern, L, S, diagonal, padding):
    """(keywords of functional.attention, number of keys that some query sees), or (None, S) where none say the same.

    diagonal: the key at which query 0 stands. padding: bool (B, S), or None.
    """
    causal, left, right = pattern
    keys, options = S, {}
    if causal:  # what lies behind the last query, as in a static cache, is cut off: then the last query sees all
        keys = diagonal + L
        options["causal"] = "upper_left" if diagonal == 0 else "lower_right"
    left, right = (-1 if reach >= keys - 1 else reach for reach in (left, right))
    window = left >= 0 or right >= 0
    if window:
        options["window"] = (left, right)
    if (causal or window) and not (0 <= diagonal == keys - L and keys <= S):
        return None, S
    if padding is not None and not (padding := padding[:, :keys]).all():
        lengths = padding.sum(1, dtype=torch.int32)
        on_the_right = torch.equal(padding, torch.arange(keys, device=padding.device) < lengths[:, None])
        # key_lengths moves the lower right diagonal
        if on_the_right and options.get("causal") != "lower_right" and (causal or not window):
            options["key_lengths"] = lengths
        else:
            options["mask"] = padding[:, None, None]
    return options, keys
