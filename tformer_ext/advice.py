"""What a call of functional.attention could be given instead, so that it takes less time: the notes of explain."""

import os

import torch

# Up to this size products and packing are tuned.
_TUNED_HEAD = 256


def operand_notes(query, key, value, options):
    """Notes, in words, on shapes and operands. Reads the elements of mask and bias."""
    yield from _mask_notes(query, key, options)
    yield from _shape_notes(query, key, value, options)


def _mask_notes(query, key, options):
    Sq, Sk = query.shape[2], key.shape[2]
    for name in ("mask", "bias"):
        t = options.get(name)
        if t is None or 0 in t.shape or t.device.type == "meta":
            continue
        t = t.detach()
        t = t[(None,) * (4 - t.dim())].expand(-1, -1, Sq, Sk)
        seen = t if name == "mask" else t != -torch.inf
        if name == "bias" and not ((t == 0) | ~seen).all():
            continue
        instead = _instead(seen)
        if name == "bias" and instead is None:
            instead = "mask= takes it as bool, in a quarter of the memory or less"
        if instead is not None:
            yield f"{name} {tuple(options[name].shape)} only hides keys; {instead}"


def _instead(seen):
    """What says the same as the bool mask seen (B, H, Sq, Sk) and lets hidden keys be skipped unread, or None."""
    if seen.all():
        return "it hides none: leave it out"
    Sq, Sk = seen.shape[2:]
    keys = seen.any(2, keepdim=True)  # those that some query sees
    padding = []
    if not keys.all():
        at_the_end = keys.shape[1] == 1 and bool((keys[..., 1:] <= keys[..., :-1]).all())
        padding = ["key_lengths"] if at_the_end else [f"a mask of shape {tuple(keys.shape)}"]
        if torch.equal(seen, keys.expand_as(seen)):
            there_already = padding != ["key_lengths"] and (seen.stride(2) == 0 or Sq == 1)
            return None if there_already else f"pass {padding[0]} instead"
    at_all = seen.flatten(0, 1).any(0)
    for causal, offset in (("upper_left", 0), ("lower_right", Sk - Sq)):
        distance = torch.arange(Sq, device=seen.device)[:, None] + offset - torch.arange(Sk, device=seen.device)
        left, right = distance[at_all].max().item(), -distance[at_all].min().item()
        band = (distance <= left) & (distance >= -right)
        if band.all() or not torch.equal(seen, (keys & band).expand_as(seen)) or left < 0 or right < 0:
            continue
        bounded = bool((distance > left).any())
        if right == 0:
            rule = [f'causal="{causal}"'] + [f"window=({left}, 0)"] * bounded
        elif causal == "lower_right":
            rule = [f"window=({left if bounded else -1}, {right})"]
        else:
            continue
        if padding and causal == "lower_right":  # key_lengths would move that diagonal
            padding = [f"a mask of shape {tuple(keys.shape)}"]
        return f"pass {', '.join(rule + padding)} instead"
    return None


def _shape_notes(query, key, value, options):
    B, Hk, D = query.shape[0], key.shape[1], max(query.shape[3], value.shape[3])
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if threads < cores and query.device.type == "cpu":
        yield f"{threads} of {cores} cores are used: torch.set_num_threads, OMP_NUM_THREADS"
    if B * Hk * -(-query.shape[2] // 64) < threads:
        yield f"{B} x {Hk} key heads with few queries are less work than there are threads to share it"
    if D > _TUNED_HEAD:
        yield f"head dimension {D}: above {_TUNED_HEAD} it runs untuned"
    if query.dtype == torch.float64:
        yield "float64 has half the lanes of float32 and twice the bytes"
    if options.get("dropout_p"):
        yield "dropout makes a random number for each weight, in both directions"
