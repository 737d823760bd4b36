"""Which kernel a call takes, and why not a faster one."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import _C, functional
from . import arguments as check
from .advice import operand_notes
from .functional import attention
from .ops.recording import is_dtensor


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


# HopperRefusal of csrc/cuda/hopper/attention_launch.h: its name, and why a call on CUDA takes the portable kernels.
HOPPER_REFUSALS = {
    1: ("dtype", "they are for bfloat16 and float16"),
    2: ("device", "they are for compute capability 9.0 only"),
    3: ("not_built", "this build has none: its TFORMER_CUDA_ARCHS have no 90"),
    4: (
        "operands",
        "with a mask that differs by query (in backward by head too), ALiBi, softcap, a scale that is not positive, or "
        "a bias of another dtype, without a stride of 1 by key and even ones else, with dropout or (in backward) with "
        "a gradient whose entries are shared there are none",
    ),
    5: ("split", "there are few queries for many keys, so the keys are split over blocks"),
    6: ("layout", "addresses or strides are no multiples of 16 bytes, a dimension is expanded, or there are no keys"),
    7: ("not_wanted", "TFORMER_EXT_SM90=0 in the environment turns them off"),
}

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
    check.head_dims_are_served(query, value)
    _check_options(query, key, value, options)
    notes, call = _copies(query, key, value), _describe(query, key, value, options)
    if query.device.type == "cuda":
        isa = "sm_{}{}".format(*torch.cuda.get_device_capability(query.device))
        product, path = _cuda_kernels(query, key, value, options)
        return Explanation("cuda", isa, product, 16, (*notes, *path, SECOND_DERIVATIVE), call)
    isa = _C.cpu_isa()
    bf16_products = {
        "avx512bf16": "bfloat16 pairs into float32 (vdpbf16ps)",
        "amxbf16": "bfloat16 in tile registers into float32 (tdpbf16ps)",
        "neonbf16": "bfloat16 blocks of 2 x 2 pairs into float32 (BFMMLA)",
    }
    native_bf16 = isa in bf16_products
    product = {
        torch.float64: "float64 multiply-add",
        torch.float32: "float32 multiply-add",
        torch.float16: "float16 widened to float32",
        torch.bfloat16: bf16_products.get(isa, "bfloat16 widened to float32"),
    }[query.dtype]
    forward, backward = _splits(query, key, value, options)
    if forward:  # backward wants larger products
        slices = "{} split into {} bfloat16 slices in tile registers (tdpbf16ps)".format(
            *("float16", "two") if query.dtype == torch.float16 else ("float32", "three")
        )
        if not backward:
            notes.append(f"backward is too small to gain from slices: {product}")
        product = slices
    if query.dtype == torch.bfloat16 and not native_bf16:
        why = (
            "TFORMER_CPU_ISA or set_cpu_isa chose a lesser one"
            if not bf16_products.keys().isdisjoint(_C.supported_isas())
            else "this CPU has no instructions for them, or the build has none (AVX512_BF16, FEAT_BF16)"
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


def _splits(query, key, value, options):
    """Whether forward's products, and backward's, are made of numbers split into slices."""
    sizes, causal = (query.shape[2], key.shape[2], query.shape[3], value.shape[3]), bool(options.get("causal", False))
    window = (-1, -1) if options.get("window") is None else check.window_pair(options["window"])
    dtype = str(query.dtype).removeprefix("torch.")
    return [_C.splits_products(dtype, sizes, causal, window, backward) for backward in (False, True)]


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


def _cuda_kernels(query, key, value, options):
    """How products are computed, and a note where kernels for sm_90a could do it and do not."""
    dtype = str(query.dtype).removeprefix("torch.")
    if is_dtensor(query):  # this rank's part is told of
        query, key, value = (t.to_local() for t in (query, key, value))
        options = {k: v.to_local() if is_dtensor(v) else v for k, v in options.items()}
    forward, backward = hopper_refusals(torch.ops.tformer_ext._attention_refusals, query, key, value, options)
    product = f"tensor cores, {dtype} into float32"
    if forward is None:
        product = f"tensor cores by warpgroups (wgmma), {dtype} into float32"
    elif query.dtype == torch.float64:
        return "float64 multiply-add", ()
    elif query.dtype == torch.float32:
        return "tensor cores, float32 in two TF32 slices", ()
    elif forward[0] == "device":
        return product, ()
    if forward == backward:
        told = {"": forward}
    else:
        told = {"forward: ": forward, "backward: ": backward}
    return product, tuple(f"{which}not the kernels for sm_90a: {why[1]}" for which, why in told.items() if why)


def hopper_refusals(operator, query, key, value, options):
    """For forward and backward (name, reason) for which a call does not go to the kernels for sm_90a, None: it does.

    The operator is that of the device's backend. Positions, lengths and sinks are no reason themselves; they have a
    part in whether keys are split."""
    B, Hq, Sq, D = query.shape
    full = (B, Hq, Sq, key.shape[2])
    dropout_p = options.get("dropout_p", 0.0)
    left, right = check.window_pair(options.get("window"))
    bias = check.score_operand("bias", options.get("bias"), full)
    codes = operator(
        *(check.unit_stride(t) for t in (query, key, value)),
        bias=bias,
        mask=check.score_operand("mask", options.get("mask"), full),
        alibi_slopes=check.alibi(options.get("alibi_slopes"), B, Hq, query.device),
        sinks=check.sink_logits(options.get("sinks"), Hq, query.device),
        key_lengths=check.lengths(options.get("key_lengths"), B, key.shape[2], query.device),
        dropout_seed=torch.zeros((), dtype=torch.int64, device=query.device) if dropout_p else None,
        causal=check.causal_code(options.get("causal", False)),
        window_left=left,
        window_right=right,
        scale=check.scale_value(options.get("scale"), D),
        softcap=check.softcap_value(options.get("softcap", 0.0)),
        dropout_p=dropout_p,
    )
    if bias is not None and bias.requires_grad and not codes[1] and (bias.shape != full or Sq == 1):
        codes = codes[0], 4  # what the operator is not asked: entries of a gradient are shared
    return tuple(HOPPER_REFUSALS[code] if code else None for code in codes)
