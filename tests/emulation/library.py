"""The compiled emulation in this process."""

import ctypes
import weakref

import torch

from . import build


def call_wrapper(library, name, tensors, numbers) -> int:
    """The status of a kernel of wrapper_kernels.cu."""
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    status = library.tformer_run_wrapper(name.encode(), *pointers, *(ctypes.c_int64(i) for i in numbers), None)
    assert status != -2, f"no kernel {name}"
    return status


def call_hopper_wrapper(library, name, source, more, out, n, rows) -> int:
    """The status of a kernel of hopper_kernels.cu; source and more are seen in boxes of rows[0] and rows[1] rows."""
    described = []
    for t, count in zip((source, more), rows, strict=True):
        sizes = (*reversed(t.shape), *(1,) * (4 - t.dim()))
        described += [ctypes.c_void_p(t.data_ptr()), (ctypes.c_int64 * 4)(*sizes), ctypes.c_int64(count)]
    status = library.tformer_run_hopper_wrapper(
        name.encode(), *described, ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(n), None
    )
    assert status != -2, f"no kernel {name}"
    return status


AMPERE, HOPPER = (8, 0), (9, 0)
MOST_SHARED_BYTES = {AMPERE: 163 << 10, HOPPER: 227 << 10}


class Emulation:
    """Loads the library, compiled if it is not given; the operators tformer_emulated::* are then there."""

    def __init__(self, path=None):
        path = path or build.build()
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.tformer_emulation_error.restype = ctypes.c_char_p
        self._library.tformer_emulated_boxes.restype = ctypes.c_int64
        self._library.tformer_emulated_blocks.restype = ctypes.c_int64
        self._library.tformer_take_guarded.restype = ctypes.c_void_p

    def set_seed(self, seed: int) -> None:
        """The order in which blocks, warps and lanes run from now on."""
        self._library.tformer_set_emulation_seed(ctypes.c_uint64(seed))

    def set_poison(self, nan: bool) -> None:
        """What memory and registers hold before they are written: NaN patterns or numbers."""
        self._library.tformer_set_emulation_poison(0xFF if nan else 0x49)

    def set_device(self, capability: tuple[int, int], hopper_kernels: bool = False) -> None:
        """The emulated device's compute capability; whether TFORMER_EXT_SM90 lets the kernels of sm_90a be taken."""
        major, minor = capability
        self._library.tformer_set_emulated_device(major, minor, int(hopper_kernels))
        self.set_shared_bytes(MOST_SHARED_BYTES[capability])

    def set_shared_bytes(self, count: int) -> None:
        """Shared memory that a block of the emulated device may have."""
        self._library.tformer_set_emulated_shared_bytes(ctypes.c_size_t(count))

    def moved_boxes(self) -> int:
        """Boxes that the emulated copy engine has moved: only kernels for sm_90a use it."""
        return self._library.tformer_emulated_boxes()

    def launched_blocks(self) -> int:
        """Blocks of all launches so far."""
        return self._library.tformer_emulated_blocks()

    def guarded(self, t: torch.Tensor) -> torch.Tensor:
        """A copy that ends, within 16 bytes, at a page whose access ends the process: what reads past it is found."""
        size = t.numel() * t.element_size()
        if size == 0:
            return t.clone()
        address = self._library.tformer_take_guarded(ctypes.c_size_t(size))
        memory = (ctypes.c_char * size).from_address(address)
        weakref.finalize(memory, self._library.tformer_give_back_guarded, ctypes.c_void_p(address))
        return torch.frombuffer(memory, dtype=t.dtype).view(t.shape).copy_(t)

    def run_wrapper(self, name, source, more, out, n=0, blocks=1, shared_bytes=0) -> str | None:
        """Runs a kernel of wrapper_kernels.cu on tensors; the error message, or None."""
        status = call_wrapper(self._library, name, (source, more, out), (n, blocks, shared_bytes))
        return self._library.tformer_emulation_error().decode() if status else None

    def run_hopper_wrapper(self, name, source, more, out, n=0, rows=(64, 64)) -> str | None:
        """Runs a kernel of hopper_kernels.cu; the error message, or None."""
        status = call_hopper_wrapper(self._library, name, source, more, out, n, rows)
        return self._library.tformer_emulation_error().decode() if status else None


class Hardware:
    """wrapper_kernels.cu, on sm_90 hopper_kernels.cu too, compiled by nvcc for the present GPU.

    FileNotFoundError: there is no toolkit.
    """

    def __init__(self):
        self._library = ctypes.CDLL(str(build.build_for_gpu()))

    def run_wrapper(self, name, source, more, out, n=0, blocks=1, shared_bytes=0) -> str | None:
        """As Emulation.run_wrapper, on CUDA tensors."""
        status = call_wrapper(self._library, name, (source, more, out), (n, blocks, shared_bytes))
        torch.cuda.synchronize()
        return f"CUDA error {status}" if status else None

    def run_hopper_wrapper(self, name, source, more, out, n=0, rows=(64, 64)) -> str | None:
        """As Emulation.run_hopper_wrapper, on CUDA tensors."""
        status = call_hopper_wrapper(self._library, name, source, more, out, n, rows)
        torch.cuda.synchronize()
        return f"CUDA error {status}" if status else None
