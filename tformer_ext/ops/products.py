"""Matrix products on the CPU, by whatever is fastest there; not recorded by autograd. Backward may call them within
autocast, which is not to change their dtypes.

torch multiplies float32 with MKL, which stays well below oneDNN's speed on CPUs other than Intel's. Where a CPU does
not multiply a 16-bit dtype, torch's products of it took 3 to 5 times as long as float32 ones (on a Cascade Lake): there
operands are widened, which is exact, and the float32 sums rounded once, as torch rounds its own.
"""

import functools
from pathlib import Path

import torch
from torch import nn

from .. import _C

empty_matrix = torch.ops.tformer_ext._empty_matrix.default

_LARGE_BYTES = 32 << 20  # glibc maps larger blocks anew each time, and the system clears them
_COLUMNS = 1008  # of a large result at a time; 1024 would be a page of float32
_PAGE_BYTES = 4096
_MOST_WIDENED = 1 << 22  # elements of an operand that are in float32 at a time
_MOST_TRANSPOSED = 1 << 20  # elements of a gradient whose part of a weight's is transposed at a time
_LEAST_TRANSPOSED = 256  # its columns at least: fewer make a slow product

ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu_, "gelu": nn.functional.gelu}


def product(x, weight, bias, activation="none"):
    """activation(x weightT + bias) of tensors of one dtype; activation "none", "relu" or (exact) "gelu"."""
    if x.dtype in widened_dtypes():
        return ACTIVATIONS[activation](_widened_product(x, weight, bias))
    if not is_faster_than_torch(x.dtype):
        return ACTIVATIONS[activation](nn.functional.linear(x, weight, bias))
    if is_large(x, weight):
        return ACTIVATIONS[activation](_large_product(x, weight, bias))
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # oneDNN would multiply by its slowest code, which takes hundreds of times as long
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, [], "none")


def input_gradient(grad, x, weight):
    """grad weight: (M, I), from rows of the gradient (M, O) of x weightT."""
    if not is_large(x, weight) or _is_paged(grad):
        return product(grad, weight.t(), None)
    result, total = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
    parts = large_parts(len(weight))
    with torch.autocast("cpu", enabled=False):
        for own in parts:
            add_part(total, result, own is parts[0], own is parts[-1], grad[:, own], weight[own].t())
    return result


def weight_gradient(grad, x, weight):
    """gradT x: (O, I), in the memory order of weight, from rows of the gradient (M, O) and of x (M, I).

    oneDNN wants the rows of its first operand in one piece and copies that operand if they are not. A gradient that is
    wider than x is not copied: xT grad is made instead, in parts whose transposition stays in cache.
    """
    rows, columns = grad.shape
    if is_large(x, weight):
        result = empty_matrix(x, *weight.shape, x.dtype)
        with torch.autocast("cpu", enabled=False):
            for own in large_parts(columns):
                some = grad[:, own]
                write_product(result[own], (some.contiguous() if _is_paged(grad) else some).t(), x.t())
        return result
    if weight.t().is_contiguous():
        return product(x.t(), grad.t(), None).t()
    if x.dtype in widened_dtypes() or columns <= x.shape[1] or rows <= x.shape[1]:
        return product(grad.t(), x.t(), None)
    transposed = x.t().contiguous()
    result = torch.empty_like(weight)
    step = max(_LEAST_TRANSPOSED, _MOST_TRANSPOSED // rows)
    for n in range(0, columns, step):
        result[n : n + step] = product(transposed, grad[:, n : n + step].contiguous().t(), None).t()
    return result


def is_large(x, weight):
    """Whether x weightT is so large that the C library gives its memory back when it is freed: the vocabulary's."""
    rows = x.numel() // x.shape[-1]
    return weight.is_contiguous() and rows * len(weight) * x.itemsize >= _LARGE_BYTES


def _is_paged(rows):
    """Whether the elements of a column fall into one set of a cache, where few of them stay."""
    return rows.stride(0) * rows.itemsize % _PAGE_BYTES == 0


def large_parts(columns):
    """Slices of a large result's columns whose operands and results stay in the caches."""
    return [slice(n, n + _COLUMNS) for n in range(0, columns, _COLUMNS)]


def _large_product(x, weight, bias):
    """In memory that is kept, a part at a time."""
    rows = x.reshape(-1, x.shape[-1])
    result = empty_matrix(x, len(rows), len(weight), x.dtype)
    for own in large_parts(len(weight)):
        write_product(result[:, own], rows, weight[own], None if bias is None else bias[own])
    return result.view(*x.shape[:-1], -1)


def write_product(out, x, weight, bias=None):
    """out = x weightT + bias, out of any row stride and of the dtype of the others or a wider one."""
    if not _writes_given_memory(x.dtype) or out.dtype != x.dtype:
        out.copy_(_fastest_product(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def add_part(total, result, is_first, is_last, x, weight):
    """One of the parts x weightT of a sum, which is kept in total until it is complete and then is in result."""
    out = result if is_last else total
    if is_first:
        write_product(out, x, weight)
    elif _writes_given_memory(x.dtype) and total.dtype == x.dtype:
        torch.addmm(total, x, weight.t(), out=out)
    else:
        torch.add(total, _fastest_product(x, weight, None), out=out)


def _fastest_product(x, weight, bias):
    return (nn.functional.linear if _writes_given_memory(x.dtype) else product)(x, weight, bias)


def _writes_given_memory(dtype):
    """Whether torch's own product of a dtype is the fastest: of those that a CPU multiplies, all but AMD's float32."""
    return dtype not in widened_dtypes() and not (dtype == torch.float32 and is_faster_than_torch(dtype))


def _widened_product(x, weight, bias):
    """In float32, some rows of each operand at a time."""
    step = max(1, _MOST_WIDENED // weight.shape[1])
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(len(rows), len(weight))
    with torch.autocast("cpu", enabled=False):  # in which backward may be called
        for m in range(0, len(rows), step):
            some = rows[m : m + step].float()
            for n in range(0, len(weight), step):
                own = slice(n, n + step)
                y[m : m + step, own] = product(some, weight[own].float(), None if bias is None else bias[own].float())
    return y.view(*x.shape[:-1], -1)


def is_faster_than_torch(dtype):
    """Whether `product` does not leave operands of this dtype to torch."""
    return dtype in widened_dtypes() or (dtype in onednn_dtypes() and torch._C._get_mkldnn_enabled())


@functools.cache
def onednn_dtypes():
    """Those that oneDNN's linear has a fast kernel for, on a CPU where torch does not have one as fast."""
    dtypes = set()
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            dtypes.add(torch.bfloat16)
        about = Path("/proc/cpuinfo")
        if about.exists() and "AuthenticAMD" in about.read_text():
            dtypes.add(torch.float32)
    return dtypes


@functools.cache
def widened_dtypes():
    """The 16-bit dtypes that this CPU has no instructions for, where it multiplies float32 in vectors."""
    isas = _C.supported_isas()
    if "avx2" not in isas:
        return frozenset()
    has_float16 = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)()
    multiplied = {torch.bfloat16: "avx512bf16" in isas, torch.float16: has_float16}
    return frozenset(dtype for dtype, can in multiplied.items() if not can)
