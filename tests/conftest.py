"""Fixtures of all tests."""

from pathlib import Path

import pytest
import torch
from ranks import Ranks

import tformer_ext
from tformer_ext import _C
from tformer_ext.arguments import has_cuda_kernels
from tformer_ext.ops import attention, residual_norm

ROOT = Path(__file__).resolve().parent.parent


ISAS = _C.supported_isas()
# and with attention's products from bfloat16 slices, however small they are
ISAS_OF_ATTENTION = [*ISAS, *(f"{isa}-split" for isa in ISAS if isa == "amxbf16")]


def _use_isa(request):
    before = _C.cpu_isa(), _C.cpu_split()
    isa, _, split = request.param.partition("-")
    _C.set_cpu_isa(isa)
    _C.set_cpu_split("always" if split else "auto")
    request.addfinalizer(lambda: (_C.set_cpu_isa(before[0]), _C.set_cpu_split(before[1])))
    return request.param


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once with the kernels of every instruction set that this CPU has."""
    return _use_isa(request)


@pytest.fixture(params=ISAS_OF_ATTENTION)
def isa_of_attention(request):
    """As isa, for attention."""
    return _use_isa(request)


@pytest.fixture
def threads():
    """Sets torch's number of threads; put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulation_library():
    """The CUDA kernels compiled for the host, and loaded."""
    if _C.build_info()["sanitize"]:
        pytest.skip("sanitizers do not know the emulation's stacks")
    if not (ROOT / "csrc").is_dir():
        pytest.skip("needs the source tree")
    from emulation.library import Emulation

    try:
        return Emulation()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def emulation(emulation_library):
    """As emulation_library, with the same device and order of threads for every test."""
    from emulation.library import AMPERE

    emulation_library.set_seed(0)
    emulation_library.set_poison(nan=True)
    emulation_library.set_device(AMPERE)
    return emulation_library


@pytest.fixture
def emulated(emulation, monkeypatch):
    """The Python functions run the emulated CUDA kernels on CPU tensors."""
    operators = torch.ops.tformer_emulated
    for module, operation in ((attention, "attention"), (residual_norm, "residual_norm")):
        for step in ("forward", "inference", "backward"):
            if hasattr(module, f"_{step}"):
                monkeypatch.setattr(module, f"_{step}", getattr(operators, f"_{operation}_{step}").default)
    return emulation


@pytest.fixture
def hopper(emulated):
    """As emulated, with the kernels of an sm_90."""
    from emulation.library import HOPPER

    emulated.set_device(HOPPER, hopper_kernels=True)
    return emulated


@pytest.fixture
def cuda():
    """New tensors are on the GPU; skips the test where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with torch.device("cuda"):
        yield


def _use(request):
    if request.param in ("emulated", "cuda"):
        request.getfixturevalue(request.param)
        return request.param
    return _use_isa(request)


ON_GPU = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(params=[*ISAS, "emulated", ON_GPU])
def kernels(request):
    """Runs the test once with the kernels of every instruction set, with the emulated CUDA kernels and on a GPU."""
    return _use(request)


@pytest.fixture(params=[*ISAS_OF_ATTENTION, "emulated", ON_GPU])
def attention_kernels_emulated_too(request):
    """As kernels, for attention."""
    return _use(request)


@pytest.fixture(params=[*ISAS_OF_ATTENTION, ON_GPU])
def attention_kernels(request):
    """As kernels, for attention: the emulation takes long for it and has tests of its own."""
    name = _use(request)
    if name == "cuda" and not has_cuda_kernels("attention"):
        pytest.skip("this build has no CUDA kernels of attention")
    return name


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks2():
    """Two processes in a process group; see ranks.py."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def ranks4():
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


def pytest_report_header():
    return f"tformer_ext {tformer_ext.__version__}: ISAs {', '.join(_C.supported_isas())}; torch {torch.__version__}"
