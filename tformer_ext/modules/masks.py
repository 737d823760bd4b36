"""torch.nn's masks (bool True = hidden, float = added to the scores) as operands of F.attention."""

import torch

# Rows of a mask that are looked at together when it is compared with the causal one.
_ROWS = 128


def check_type(name, mask):
    """torch's own error for a mask that is neither bool nor floating."""
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(f"only bool and floating types of {name} are supported")


def _readable(t):
    """Whether looking at the values of t is cheap and breaks no graph."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and type(t) is torch.Tensor


def is_causal_mask(mask):
    """Whether mask (S, S) hides exactly the keys after each query and adds nothing to the others.

    False where finding out would cost more than it saves or break a graph: on other devices, in torch.compile. Most
    other masks are told apart by two elements; a causal one is read once.
    """
    if mask is None or mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.shape[0] < 2:
        return False
    if not _readable(mask) or mask.requires_grad or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    hidden = True if mask.dtype == torch.bool else -torch.inf
    if mask[0, -1] != hidden or mask[-1, 0] != 0:
        return False
    size = mask.shape[0]
    for start in range(0, size, _ROWS):
        end = min(start + _ROWS, size)
        rows = mask[start:end]
        square = rows[:, start:end]
        upper = torch.ones_like(square, dtype=torch.bool).triu(1)
        expected = torch.zeros_like(square).masked_fill(upper, hidden)
        if rows[:, :start].any() or not (rows[:, end:] == hidden).all() or not torch.equal(square, expected):
            return False
    return True


def padding_operands(padding, by_length):
    """key_padding_mask (N, S) as (bias, mask, key_lengths) of F.attention, two of them None.

    A floating mask that only hides becomes a bool one, which costs no sum with a bias and less time. by_length: padding
    at the end may become lengths, so that hidden keys are not even visited.
    """
    if padding.dtype != torch.bool:
        hides = padding == -torch.inf
        if padding.requires_grad or not _readable(padding) or not (hides | (padding == 0)).all():
            return padding[:, None, None], None, None
        padding = hides
    if by_length and _readable(padding) and (padding[:, 1:] >= padding[:, :-1]).all():
        return None, None, padding.shape[1] - padding.sum(1)
    return None, ~padding[:, None, None], None
