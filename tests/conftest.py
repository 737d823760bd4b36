"""Fixtures of all tests."""

import pytest
import torch
from ranks import Ranks

import tformer_ext
from tformer_ext import _C


@pytest.fixture(params=_C.supported_isas())
def isa(request):
    """Runs the test once with the kernels of every instruction set that this CPU has."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.fixture
def threads():
    """Sets torch's number of threads; put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
