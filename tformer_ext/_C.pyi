"""Compiled part of tformer_ext: importing it registers the operators torch.ops.tformer_ext.*."""

from typing import Any

def built_isas() -> list[str]:
    """Instruction sets compiled in, least capable first (of baseline, avx2, avx512, avx512bf16)."""

def supported_isas() -> list[str]:
    """Those of built_isas() that this CPU can run, least capable first."""

def cpu_isa() -> str:
    """The instruction set in use."""

def set_cpu_isa(name: str) -> None:
    """Uses the kernels of this instruction set from now on, in all threads. ValueError lists what can be."""

def vector_bytes() -> int:
    """Width of a vector register of the instruction set in use, in bytes."""

def measure_ceiling(kind: str, dtype: str, seconds: float = 0.02) -> float:
    """Operations per second of this thread: kind fma (a multiply-add is two) or exp, dtype a name like float32."""

def build_info() -> dict[str, Any]:
    """How this was built: version, commit, torch, cuda, sanitize, flags (per instruction set), compiler.

    cuda lists what the CUDA kernels were compiled to, such as sm_90, or compute_80, which the drivers of newer GPUs
    compile; it is empty in a build without them.
    """
