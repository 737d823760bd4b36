"""The emulation of what only sm_90a has: its wrappers do what the PTX ISA says, and planted faults are found."""

import re

import pytest
import torch
from hopper_wrappers import (
    boxes_of,
    boxes_source,
    chain,
    multiply_across,
    multiply_down,
    multiply_registers,
    multiply_shared,
    ring,
)


@pytest.fixture
def hopper(emulation):
    """As `emulation`, on an emulated sm_90; not as conftest's, which is for the Python functions."""
    from emulation.library import HOPPER

    emulation.set_device(HOPPER)
    return emulation


def ran(message):
    assert message is None, message


@pytest.mark.parametrize("seed", range(3))
def test_boxes_are_swizzled_and_end_in_zeros(hopper, seed):
    hopper.set_seed(seed)
    source, out = boxes_source(), torch.empty(2, 32, 64, dtype=torch.int16)
    ran(hopper.run_hopper_wrapper("boxes", source, source, out, rows=(32, 32)))
    assert torch.equal(out, boxes_of(source))


@pytest.mark.parametrize("dtype, N", [("bf16", 32), ("bf16", 64), ("bf16", 80), ("bf16", 112), ("f16", 128)])
@pytest.mark.parametrize("n", [0, 1])
def test_products_of_shared_operands(hopper, dtype, N, n):
    a, b, c, expected = multiply_shared(dtype, N, n)
    ran(hopper.run_hopper_wrapper(f"shared_{dtype}_{N}", a, b, c, n=n, rows=(64, N)))
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, N", [("bf16", 64), ("f16", 128), ("bf16", 128)])
@pytest.mark.parametrize("name, of", [("across", multiply_across), ("down", multiply_down)])
def test_products_down_columns(hopper, name, of, dtype, N):
    a, b, expected = of(dtype, N)
    out = torch.empty(64, N)
    ran(hopper.run_hopper_wrapper(f"{name}_{dtype}_{N}", a, b, out, rows=(64, 64)))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, N", [("bf16", 64), ("f16", 128), ("bf16", 256)])
def test_products_of_registers(hopper, dtype, N):
    b, expected = multiply_registers(dtype, N)
    out = torch.empty(64, N)
    ran(hopper.run_hopper_wrapper(f"registers_{dtype}_{N}", b, b, out, rows=(32, 32)))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_ring(hopper):
    rows, expected = ring()
    for seed in range(10):
        hopper.set_seed(seed)
        out = torch.empty(256, dtype=torch.int32)
        ran(hopper.run_hopper_wrapper("ring", rows, rows, out, n=len(rows), rows=(8, 8)))
        assert torch.equal(out, expected)


def run_chain(hopper, fault=0, seeds=20):
    """The message, and whether the sums were as expected, for each seed."""
    any_tensor, (zeros, expected) = torch.zeros(64, 64, dtype=torch.int16), chain()
    for seed in range(seeds):
        hopper.set_seed(seed)
        out = zeros.clone()
        message = hopper.run_hopper_wrapper("chain", any_tensor, any_tensor, out, n=fault)
        yield message, torch.equal(out, expected)


def test_blocks_take_turns(hopper):
    assert set(run_chain(hopper)) == {(None, True)}


@pytest.mark.parametrize("fault", [1, 2])
def test_blocks_out_of_turn_show(hopper, fault):
    results = list(run_chain(hopper, fault))
    assert (None, False) in results and not any(message for message, _ in results)


def test_source_overwritten_too_early(hopper):
    assert any(message and "overwritten before it was read" in message for message, _ in run_chain(hopper, 3))


FAULTS = {
    1: "an operand was overwritten before the product was waited for",
    3: "a register was written while products add to it",
    4: "no wgmma_fence",
    5: "wait for each other",
    6: "not at a multiple of 1024",
    8: "an operand was overwritten",
    9: "warps of a warpgroup did not do the same",
    10: "a copy is on its way when the block ends",
    11: "more arrivals than the phase has",
    12: "warps of a warpgroup did not do the same",
}


def fault(hopper, n, name="faults"):
    ones, out = torch.ones(64, 64).bfloat16(), torch.zeros(128)
    return hopper.run_hopper_wrapper(name, ones, 2 * ones, out, n=n), out


@pytest.mark.parametrize("n", FAULTS)
def test_faults_are_found(hopper, n):
    message, _ = fault(hopper, n)
    assert message is not None
    assert re.search(FAULTS[n], message), message


def test_what_is_not_there_yet(hopper):
    """Operands before their copies, or a sum before it is waited for: an error or NaN, whatever the order."""
    for seed in range(5):
        hopper.set_seed(seed)
        message, out = fault(hopper, 0)
        assert message is not None or torch.isnan(out).all()
        message, out = fault(hopper, 2)
        assert message is None and torch.isnan(out).all()
    message, out = fault(hopper, 99)  # none
    assert message is None and out.eq(16).all()


def test_registers_are_counted(hopper):
    message, _ = fault(hopper, 0, "too_many_registers")
    assert message is not None and re.search(r"wait for each other.*more_registers", message)


def test_maps_are_checked(hopper):
    odd = torch.zeros(8, 65, dtype=torch.int16)
    assert "copy engine" in hopper.run_hopper_wrapper("boxes", odd, odd, torch.zeros(1), rows=(8, 8))


def test_shared_memory_of_an_older_device(emulation):
    source = boxes_source()
    assert "shared memory" in emulation.run_wrapper("race", None, None, torch.zeros(64), shared_bytes=200 << 10)
    assert emulation.run_hopper_wrapper("boxes", source, source, torch.zeros(2, 32, 64), rows=(32, 32)) is None
