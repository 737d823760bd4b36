"""Faults planted in the source of the backward kernels for sm_90a: the emulation finds each of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
HEADERS = {"narrow": "hopper/attention_backward.h", "wide": "hopper/attention_backward_wide.h"}
SHARED = "hopper/attention_backward_work.h"
KERNEL = "hopper/attention_backward_bf16.cu"
CASES = {"narrow": ("several tiles", "causal 64"), "wide": ("wide several tiles", "wide several tiles causal")}
# Only the kernels of these cases are compiled: plain ones of their widths.
LAUNCH = "hopper/attention_backward_launch.h"
ONLY_THESE = {
    width: [
        ("constexpr int kWidth = decltype(width)::value;", f"constexpr int kWidth = {expression};"),
        ("constexpr HopperExtra kExtra = decltype(extra)::value;", "constexpr HopperExtra kExtra = HopperExtra::none;"),
    ]
    for width, expression in (("narrow", "decltype(width)::value == 64 ? 64 : 128"), ("wide", "256"))
}
FAULTS = {
    "queries are not waited for": [("      mbarrier_wait(&at.q_handover[buffer].full, phase_of(n));\n", "")],
    "do is not waited for": [("      mbarrier_wait(&at.grad_o_handover[buffer].full, phase_of(n));\n", "")],
    "scores are not waited for": [("      wgmma_wait<1>();  // the scores\n", "")],
    "dq is not waited for": [("      wgmma_wait<1>();  // dv and dq\n", "")],
    "dk is not waited for": [("      wgmma_wait<0>();\n      hold(dk);", "      hold(dk);")],
    "queries are given back while they are read": [
        ("      send(dq, n);\n", "      release(at.q_handover[buffer]);\n      send(dq, n);\n"),
        ("      hold(grads);\n      release(at.q_handover[buffer]);\n", "      hold(grads);\n"),
    ],
    "ds of the other warpgroup is not waited for": [
        ("      sync_threads_of(kMultiplyBarrier, kGroups * kWarpgroup);\n      multiply_keys", "      multiply_keys")
    ],
    "sums are overwritten": [
        ("    if (n > 0) mbarrier_wait(&at.sums_handover", "    if (n < 0) mbarrier_wait(&at.sums_handover")
    ],
    "sums are overwritten while they are read": [("  bulk_wait_read<0>();\n", "")],
    "sums are sent before they are there": [("  mbarrier_wait(&handover.full, phase);\n", "")],
    "nobody waits for a turn": [("  if (!first) wait_for_turn_of(turn, job.tile);\n", "")],
    "the turn is given too early": [("  bulk_wait<0>();\n", "")],
    "the turn of another tile": [("give_turn(turn, job.tile + 1)", "give_turn(turn, job.tile)")],
    "the first tile adds": [("job.range(p).begin(i0) / kKeys == job.tile", "false")],
    "blocks take no ticket": [("take_ticket(given.ticket)", "static_cast<int>(block_index<0>())")],
    "a turn that never comes": [("wait_for_turn_of(turn, job.tile)", "wait_for_turn_of(turn, job.tile + 1)")],
}
WIDE_FAULTS = {
    "queries are not waited for": [("    mbarrier_wait(&at.q_handover[buffer_of(n)].full, phase_of(n));\n", "")],
    "do is not waited for": [("    mbarrier_wait(&at.grad_o_handover->full, n & 1);\n", "")],
    "scores are not waited for": [("        wgmma_wait<1>();\n        hold(s);\n", "        hold(s);\n")],
    "dp is not waited for": [("    wgmma_wait<0>();\n    hold(dp);\n", "    hold(dp);\n")],
    "do is given back while dv is made": [
        ("        release(*at.grad_o_handover);\n", ""),
        (
            "        start_scores(s, n + 1);\n",
            "        release(*at.grad_o_handover);\n        start_scores(s, n + 1);\n",
        ),
    ],
    "queries are given back while dk is made": [
        ("        wgmma_wait<2>();\n        hold(dk);\n", "        hold(dk);\n")
    ],
    "dq is not waited for": [("        wgmma_wait<2>();\n        hold(dq);\n", "        hold(dq);\n")],
    "the last dq is not waited for": [("      wgmma_wait<1>();\n      hold(dv);\n", "      hold(dv);\n")],
    "the last dk is not waited for": [("      wgmma_wait<0>();\n      hold(dk);\n", "      hold(dk);\n")],
    "weights of the other warpgroup are not waited for": [
        ("    fence_async_proxy();\n    sync_threads_of(kMultiplyBarrier, kGroups * kWarpgroup);\n", "")
    ],
    "ds is overwritten": [("return {ds + buffer_of(n) * ScoreTile::kBytes}", "return {ds}")],
    "sums are overwritten": [("    if (chunk > 0) mbarrier_wait", "    if (chunk < 0) mbarrier_wait")],
    "both halves of dq in one slot": [("job.b, h, i0) + half;", "job.b, h, i0);")],
    "columns of the other warpgroup are not waited for": [
        ("    sync_threads_of(kMultiplyBarrier, kGroups * kWarpgroup);\n    const bool keys", "    const bool keys")
    ],
}
ALL_FAULTS = [("narrow", name) for name in FAULTS] + [("wide", name) for name in WIDE_FAULTS]
RUN = """
import sys
import torch
from emulation.library import HOPPER, Emulation
from hopper_cases import BACKWARD_CASES, backward_inputs
from cases import gradients, in_dtype
from tformer_ext import functional as F
from tformer_ext.ops import attention

emulation, expected = Emulation(sys.argv[1]), {}
emulation.set_device(HOPPER, hopper_kernels=True)
for step in ("forward", "backward"):
    setattr(attention, f"_{step}", getattr(torch.ops.tformer_emulated, f"_attention_{step}").default)
for case in BACKWARD_CASES:
    if case.name not in sys.argv[2:]:
        continue
    qkv, options, cotangents = backward_inputs(case, torch.bfloat16)
    leaves = in_dtype(qkv, options, torch.bfloat16, True)
    expected = gradients(F.attention, *in_dtype(qkv, options, torch.float64, True), cotangents)[1]
    first = None
    for seed in range(15):
        emulation.set_seed(seed)
        emulation.set_poison(nan=seed % 2 == 1)  # a NaN could be repaired
        grads = gradients(F.attention, *leaves, cotangents)[1]
        first = first or grads
        for a, b, e in zip(grads, first, expected, strict=True):
            assert torch.equal(a, b), "found: the order shows"
            assert (a.double() - e).norm() < 0.02 * e.norm(), "found: values are wrong"
"""


@pytest.fixture(scope="module", autouse=True)
def needs(emulation_library):
    """What the emulation needs."""


def run_changed(folder, width, changes):
    from emulation import build

    shared = (ROOT / "csrc/cuda" / SHARED).read_text()
    header = SHARED if changes and all(old in shared for old, _ in changes) else HEADERS[width]
    library = build.build_changed(folder, {LAUNCH: ONLY_THESE[width], header: changes}, KERNEL)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(library), *CASES[width]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("width", HEADERS)
def test_without_a_fault_nothing_is_found(width, tmp_path):
    result = run_changed(tmp_path, width, [])
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("width, name", ALL_FAULTS)
def test_fault_is_found(width, name, tmp_path):
    result = run_changed(tmp_path, width, (FAULTS if width == "narrow" else WIDE_FAULTS)[name])
    last = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else ""
    assert result.returncode != 0, "the fault was not found"
    assert "found: " in last or "attention backward for sm_90a: " in result.stderr, result.stderr
