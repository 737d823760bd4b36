"""Which kernel a call takes, and why not a faster one."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import _C, functional
from . import arguments as check
from .advice import operand_notes
from .functional import attention


@dataclass(frozen=True)
class Explanation:
    """How tformer_ext.functional.attention runs a call. str() gives it as text.

    backend: "cpu" or "cuda". isa: the instruction set of the kernels; for "cuda" the GPU's, such as "sm_90".
    product: how products are computed. vector_bytes: width of a vector register, or of a GPU thread's memory access.
    notes: what costs time and could be avoided, in words. call: shapes and options.
    """

    backend: str
    isa: str
    product: str
    vector_bytes: int
    notes: tuple[str, ...]
    call: str = ""

    def __str__(self):
        lines = [self.call, f"{self.backend} kernels for {self.isa}: {self.product}, {self.vector_bytes}-byte vectors"]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


SECOND_DERIVATIVE = "a second derivative runs through the reference in PyTorch operations"


def _check_options(query, key, value, options):
    """Raises as the call would; nothing is computed on the meta device."""
    tensors = [t.detach().to("meta") for t in (query, key, value)]
    moved = {k: v.detach().to("meta") if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    attention(*tensors, **moved)


def explain(query, key, value, **options):
    """Explains the call tformer_ext.functional.attention(query, key, value, **options) without running it.

    Returns an Explanation. Arguments are checked as there.
    """
    check.check_qkv(query, key, value)
    check.device_is_served(query)
    _check_options(query, key, value, options)
    notes, call = _copies(query, key, value), _describe(query, key, value, options)
    if query.device.type == "cuda":
        isa = "sm_{}{}".format(*torch.cuda.get_device_capability(query.device))
        return Explanation("cuda", isa, _cuda_product(query.dtype), 16, (*notes, SECOND_DERIVATIVE), call)
    isa = _C.cpu_isa()
    native_bf16 = isa == "avx512bf16"
    product = {
        torch.float64: "float64 multiply-add",
        torch.float32: "float32 multiply-add",
        torch.float16: "float16 widened to float32",
        torch.bfloat16: "bfloat16 pairs into float32 (vdpbf16ps)" if native_bf16 else "bfloat16 widened to float32",
    }[query.dtype]
    if query.dtype == torch.bfloat16 and not native_bf16:
        why = (
            "TFORMER_CPU_ISA or set_cpu_isa chose a lesser one"
            if "avx512bf16" in _C.supported_isas()
            else "this CPU has no AVX512_BF16"
        )
        notes.append(f"bfloat16 products run at float32 speed: the kernels are for {isa}; {why}")
    supported = _C.supported_isas()
    if isa != supported[-1]:
        notes.append(f"kernels for {supported[-1]} are there and this CPU can run them, but {isa} was chosen")
    bias = options.get("bias")
    if bias is not None and bias.requires_grad:
        notes.append("the bias wants a gradient: where batches or heads share it, backward computes scores twice")
    notes += [SECOND_DERIVATIVE, *operand_notes(query, key, value, options)]
    return Explanation("cpu", isa, product, _C.vector_bytes(), tuple(notes), call)


def _describe(query, key, value, options):
    """The call in one line."""
    shown = {"query": query, "key": key, "value": value, **options}
    told = [
        f"{name} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else f"{name}={t!r}"
        for name, t in shown.items()
        if t is not None and t is not False
    ]
    return f"attention of {query.dtype}: {', '.join(told)}".replace("torch.", "")


@contextmanager
def explain_calls():
    """Explains the calls of functional.attention that models and modules make within a `with` block.

    Yields a list that gets an Explanation for each call, as explain gives it; the calls run as ever. Not for
    torch.compile, in which calls are not made one by one.
    """
    explained, before = [], functional.attention

    def watched(query, key, value, **options):
        explained.append(explain(query, key, value, **{k: v for k, v in options.items() if k != "return_lse"}))
        return before(query, key, value, **options)

    functional.attention = watched
    try:
        yield explained
    finally:
        functional.attention = before


def _copies(query, key, value):
    tensors = (("query", query), ("key", key), ("value", value))
    strided = [(name, t.stride(-1)) for name, t in tensors if t.shape[-1] != 1 and t.stride(-1) != 1]
    return [f"{name} is copied: its last dimension has stride {stride}, not 1" for name, stride in strided]


def _cuda_product(dtype):
    return {
        torch.float64: "float64 multiply-add",
        torch.float32: "float32 multiply-add",
        torch.float16: "tensor cores, float16 into float32",
        torch.bfloat16: "tensor cores, bfloat16 into float32",
    }[dtype]
