"""Checks of the public functions' arguments, before any kernel runs.

Every error names the argument, what was expected and what came. The checks read shapes only; the values of lengths are
read where that costs nothing, on the CPU and outside torch.compile.
"""

import math
from itertools import pairwise

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CAUSAL = {False: 0, None: 0, True: 1, "upper_left": 1, "lower_right": 2}


def _shape(t):
    return tuple(t.shape)


def _tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {value.layout}")


def _number(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def unit_stride(t):
    """t, copied only where its last dimension is not contiguous."""
    return t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()


# Looked up here, once: torch.compile of torch 2.11 cannot trace a question to the dispatcher.
_ON_CUDA = frozenset(
    operation
    for operation in ("attention", "residual_norm")
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"tformer_ext::_{operation}_forward", "CUDA")
)


def has_cuda_kernels(operation):
    """Whether this build has kernels of the operation, "attention" or "residual_norm", for CUDA tensors."""
    return operation in _ON_CUDA


def device_is_served(t, name="query", operation="attention"):
    """Raises where there are no kernels of the operation for the device of t."""
    device = t.device.type
    if device in ("cpu", "meta") or (device == "cuda" and has_cuda_kernels(operation)):
        return
    devices = "CPU and CUDA tensors" if has_cuda_kernels(operation) else "CPU tensors only"
    raise NotImplementedError(
        f"{name}: this build of tformer_ext has kernels of {operation} for {devices}, got a tensor on {t.device}"
    )


MOST_CUDA_HEAD_DIM = 256


def head_dims_are_served(query, value):
    """Raises where the kernels of attention for the device of query are not made for such head dimensions."""
    if query.device.type != "cuda":
        return
    for name, t in (("query", query), ("value", value)):
        if t.shape[-1] > MOST_CUDA_HEAD_DIM:
            raise NotImplementedError(
                f"{name}: expected a head dimension up to {MOST_CUDA_HEAD_DIM} on CUDA, got {t.shape[-1]}"
            )


def same_device(name, t, device):
    if t.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} as the others, got one on {t.device}")


def check_qkv(query, key, value):
    """Shapes (B, Hq, Sq, D), (B, Hk, Sk, D), (B, Hk, Sk, Dv), one floating dtype, one device."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        _tensor(name, t)
        if t.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (B, H, S, D), got {t.dim()}: {_shape(t)}")
    dtype, device = query.dtype, query.device
    if dtype not in DTYPES:
        raise TypeError(f"query: expected float64, float32, bfloat16 or float16, got {dtype}")
    for name, t in (("key", key), ("value", value)):
        if t.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype} as in query, got {t.dtype}")
        same_device(name, t, device)
    B, Hq, _, D = query.shape
    if key.shape[0] != B or key.shape[3] != D:
        raise ValueError(
            f"key: expected (B, Hk, Sk, D) with B = {B} and D = {D} as in query {_shape(query)}, got {_shape(key)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected (B, Hk, Sk, Dv) with the first three as in key {_shape(key)}, got {_shape(value)}"
        )
    if D == 0 or value.shape[3] == 0:
        raise ValueError(f"query, value: expected head dimensions above 0, got {_shape(query)}, {_shape(value)}")
    if key.shape[1] == 0 or Hq == 0 or Hq % key.shape[1]:
        raise ValueError(f"query: expected the number of heads to be a multiple of key's {key.shape[1]}, got {Hq}")


def broadcasts(shape, full):
    """Whether a tensor of this shape broadcasts to `full`."""
    return len(shape) <= len(full) and all(
        a == b or a == 1 for a, b in zip(reversed(shape), reversed(full), strict=False)
    )


def score_operand(name, t, full):
    """bias or mask as 4-D, each dimension 1 or that of `full` = (B, Hq, Sq, Sk)."""
    if t is None:
        return None
    _tensor(name, t)
    if name == "mask" and t.dtype != torch.bool:
        raise TypeError(
            f"mask: expected torch.bool, True = may attend, got {t.dtype}; a floating mask is a bias: pass bias="
        )
    if name == "bias" and t.dtype not in DTYPES:
        raise TypeError(f"bias: expected a floating dtype, got {t.dtype}; a bool mask goes to mask=")
    if not broadcasts(t.shape, full):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to (B, Hq, Sq, Sk) = {tuple(full)}, got {_shape(t)}"
        )
    return in_four_dimensions(t)


def in_four_dimensions(t):
    """t with leading dimensions of size 1; None as it is."""
    return t if t is None or t.dim() >= 4 else t[(None,) * (4 - t.dim())]


def causal_code(causal):
    try:
        return CAUSAL[causal]
    except (KeyError, TypeError):
        raise ValueError(f'causal: expected False, True, "upper_left" or "lower_right", got {causal!r}') from None


def window_pair(window):
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window: expected (left, right), got {window!r}")
    for side in window:
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"window: expected two ints, got {window!r}")
        if side < -1:
            raise ValueError(f"window: expected -1 (unbounded) or more on both sides, got {window!r}")
    return tuple(window)


def softcap_value(softcap):
    softcap = _number("softcap", 0.0 if softcap is None else softcap)
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected 0 (off) or a positive number, got {softcap}")
    return softcap


def scale_value(scale, D):
    return 1.0 / math.sqrt(D) if scale is None else _number("scale", scale)


def probability(name, p):
    p = _number(name, p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {p}")
    return p


def seed_tensor(seed, dropout_p, device):
    """An int64 scalar tensor: the given seed, or one drawn from torch's default generator; None without dropout."""
    if dropout_p == 0.0:
        if seed is not None and not isinstance(seed, (int, torch.Tensor)):
            raise TypeError(f"dropout_seed: expected an int or an int64 tensor, got {type(seed).__name__}")
        return None
    if seed is None:
        return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.Tensor)):
        raise TypeError(f"dropout_seed: expected an int or an int64 tensor, got {type(seed).__name__}")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"dropout_seed: expected an int of 64 bits, got {seed}")
        # full: a kernel writes it, where a copy would wait for the GPU and could not be captured into a graph
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"dropout_seed: expected one int64 element, got {seed.dtype} of shape {_shape(seed)}")
    return seed if seed.device == device or device.type == "meta" else seed.to(device, non_blocking=True)


def alibi(slopes, B, Hq, device):
    if slopes is None:
        return None
    _tensor("alibi_slopes", slopes)
    if slopes.dtype not in DTYPES:
        raise TypeError(f"alibi_slopes: expected a floating dtype, got {slopes.dtype}")
    if _shape(slopes) not in ((Hq,), (B, Hq)):
        raise ValueError(f"alibi_slopes: expected shape ({Hq},) or ({B}, {Hq}), got {_shape(slopes)}")
    if slopes.requires_grad:
        raise ValueError("alibi_slopes: expected constants, got a tensor that requires grad; use bias= to train it")
    same_device("alibi_slopes", slopes, device)
    return slopes.float()


def sink_logits(sinks, Hq, device):
    if sinks is None:
        return None
    _tensor("sinks", sinks)
    if sinks.dtype not in DTYPES:
        raise TypeError(f"sinks: expected a floating dtype, got {sinks.dtype}")
    if _shape(sinks) != (Hq,):
        raise ValueError(f"sinks: expected shape ({Hq},), one logit per query head, got {_shape(sinks)}")
    same_device("sinks", sinks, device)
    return sinks.contiguous()


def _int_vector(name, t, size, device):
    _tensor(name, t)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {t.dtype}")
    if t.dim() != 1 or (size is not None and t.shape[0] != size):
        expected = "a vector" if size is None else f"shape ({size},)"
        raise ValueError(f"{name}: expected {expected}, got {_shape(t)}")
    same_device(name, t, device)
    return t.to(torch.int32).contiguous()


def _readable(t):
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and type(t) is torch.Tensor


def lengths(key_lengths, B, Sk, device):
    if key_lengths is None:
        return None
    t = _int_vector("key_lengths", key_lengths, B, device)
    if _readable(t) and B and not (0 <= int(t.min()) and int(t.max()) <= Sk):
        raise ValueError(f"key_lengths: expected values from 0 to Sk = {Sk}, got {key_lengths.tolist()}")
    return t


def cumulative(name, cu_seqlens, total, device, size=None):
    t = _int_vector(name, cu_seqlens, size, device)
    if t.shape[0] == 0:
        raise ValueError(f"{name}: expected (sequences + 1) entries, the first 0, got none")
    if _readable(t):
        values = t.tolist()
        if values[0] != 0 or values[-1] != total or any(a > b for a, b in pairwise(values)):
            raise ValueError(f"{name}: expected 0 ... {total}, never falling, got {values}")
    return t


def check_norm(x, residual, weight, bias, residual_dtype):
    """Returns (number of normalised dimensions, dtype of the sum)."""
    _tensor("x", x)
    # each asked for once: a question to a tensor takes longer than a comparison
    dtype, shape, device = x.dtype, x.shape, x.device
    if dtype not in DTYPES:
        raise TypeError(f"x: expected float64, float32, bfloat16 or float16, got {dtype}")
    if len(shape) == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    dims = 1
    for name, t in (("bias", bias), ("weight", weight)):
        if t is not None:
            _tensor(name, t)
            if t.dtype not in DTYPES:
                raise TypeError(f"{name}: expected a floating dtype, got {t.dtype}")
            dims = t.dim()
            if dims == 0 or dims > len(shape) or t.shape != shape[len(shape) - dims :]:
                raise ValueError(f"{name}: expected the last dimensions of x {_shape(x)}, got {_shape(t)}")
            same_device(name, t, device)
    if weight is not None and bias is not None and weight.shape != bias.shape:
        raise ValueError(f"bias: expected shape {_shape(weight)} as weight, got {_shape(bias)}")
    allowed = (dtype,) if dtype in (torch.float64, torch.float32) else (dtype, torch.float32)
    sum_dtype = dtype
    if residual is not None:
        _tensor("residual", residual)
        if residual.shape != shape:
            raise ValueError(f"residual: expected the shape of x {_shape(x)}, got {_shape(residual)}")
        if residual.dtype not in DTYPES:
            raise TypeError(f"residual: expected a floating dtype, got {residual.dtype}")
        same_device("residual", residual, device)
        sum_dtype = torch.promote_types(dtype, residual.dtype)
        if sum_dtype not in allowed:
            raise TypeError(f"residual: expected dtype {' or '.join(map(str, allowed))}, got {residual.dtype}")
    if residual_dtype is not None:
        if residual_dtype not in allowed:
            raise TypeError(
                f"residual_dtype: expected {' or '.join(map(str, allowed))} with x of {dtype}, got {residual_dtype}"
            )
        sum_dtype = residual_dtype
    return dims, sum_dtype
