"""Faults planted in the source of the backward kernels whose blocks add to the same sums: the emulation finds each."""

import traceback
from pathlib import Path

import pytest
import torch
from cases import gradients, in_dtype
from emulation import build
from emulation.library import AMPERE, HOPPER, Emulation
from hopper_cases import BACKWARD_CASES, backward_inputs
from ranks import CONTEXT

from tformer_ext import functional as F
from tformer_ext.ops import attention

ROOT = Path(__file__).resolve().parent.parent
HEADERS = {
    "portable": "attention_dqkv.h",
    "narrow": "hopper/attention_backward.h",
    "wide": "hopper/attention_backward_wide.h",
}
SHARED = "hopper/attention_backward_work.h"
CASES = {
    "portable": ("window left only",),
    "narrow": ("several tiles", "causal 64"),
    "wide": ("wide several tiles", "wide several tiles causal"),
}
# Only the kernels of these cases are compiled: plain ones of their widths.
ONLY_THESE = {
    width: [
        ("constexpr int kWidth = decltype(width)::value;", f"constexpr int kWidth = {expression};"),
        ("constexpr HopperExtra kExtra = decltype(extra)::value;", "constexpr HopperExtra kExtra = HopperExtra::none;"),
    ]
    for width, expression in (("narrow", "decltype(width)::value == 64 ? 64 : 128"), ("wide", "256"))
}
ONLY_THESE["portable"] = [
    ("constexpr int kWidth = decltype(width)::value, kKeys", "constexpr int kWidth = 64, kKeys"),
    ("constexpr bool kPlain = decltype(plain)::value;", "constexpr bool kPlain = true;"),
    ("  return for_width(call, [&]", "  return [](auto&&...) { return Status{1}; }(call, [&]"),
    ("  return for_width(given, [&]", "  return [](auto&&...) { return Status{1}; }(given, [&]"),
]
PORTABLE_FAULTS = {
    "queries are not waited for": [("copy_async_wait<0>();", "if (step.n == 0) copy_async_wait<0>();")],
    "weights of other warps are not waited for": [
        ("      sync_block();  // weights and their gradients are there\n", "")
    ],
    "do is overwritten while it is read": [
        ("      if (more) load_grad_o(next);\n", ""),
        ("      const int slot =", "      if (more) load_grad_o(next);\n      const int slot ="),
    ],
    "queries are overwritten while they are read": [("stages + step.n % kStages * kStageBytes", "stages")],
    "half rows are stored": [
        ("    sync_block();  // rows are whole; of the warps that made them each stores some\n", "")
    ],
    "nobody waits for a turn": [("      if (!first && thread_index() == 0) wait_for_turn_of(turn, tile);\n", "")],
    "the turn is given too early": [
        ("      if (turn && thread_index() == 0) give_turn(turn, tile + 1);\n      const Step", "      const Step"),
        ("      Sums::add(", "      if (thread_index() == 0) give_turn(turn, tile + 1);\n      Sums::add("),
    ],
    "the first tile adds": [(".begin(step.i0) / kKeys == tile;", ".begin(step.i0) / kKeys > tile;")],
    "blocks take no ticket": [("take_ticket(given.ticket)", "static_cast<int>(block_index<0>())")],
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
FAULTS_OF = {"portable": PORTABLE_FAULTS, "narrow": FAULTS, "wide": WIDE_FAULTS}
ALL_FAULTS = [(width, name) for width, faults in FAULTS_OF.items() for name in faults]


def find(library, width, orders, said):
    """In a process of its own: what is wrong with the gradients of a library, by so many orders of its threads, goes to
    the file `said`."""
    try:
        torch.set_num_threads(1)
        cases = [backward_inputs(case, torch.bfloat16) for case in BACKWARD_CASES if case.name in CASES[width]]
        assert len(cases) == len(CASES[width])
        golden = [gradients_in(torch.float64, *case) for case in cases]  # by the CPU's kernels
        emulation = Emulation(library)
        emulation.set_device(*((AMPERE,) if width == "portable" else (HOPPER, True)))
        for step in ("forward", "backward"):
            setattr(attention, f"_{step}", getattr(torch.ops.tformer_emulated, f"_attention_{step}").default)
        for case, expected in zip(cases, golden, strict=True):
            look(emulation, case, expected, orders)
    except BaseException:
        said.write_text(traceback.format_exc())
        raise SystemExit(1) from None


def look(emulation, case, expected, orders):
    first = None
    for seed in range(orders):
        emulation.set_seed(seed)
        emulation.set_poison(nan=seed % 2 == 1)  # a NaN could be repaired
        grads = gradients_in(torch.bfloat16, *case)
        first = first or grads
        for a, b, e in zip(grads, first, expected, strict=True):
            assert torch.equal(a, b), "found: the order shows"
            assert (a.double() - e).norm() < 0.02 * e.norm(), "found: values are wrong"


def gradients_in(dtype, qkv, options, cotangents):
    return gradients(F.attention, *in_dtype(qkv, options, dtype, True), cotangents)[1]


@pytest.fixture(scope="module", autouse=True)
def needs(emulation_library):
    """What the emulation needs."""


def run_changed(folder, width, changes):
    shared = (ROOT / "csrc/cuda" / SHARED).read_text()
    header = SHARED if width != "portable" and changes and all(old in shared for old, _ in changes) else HEADERS[width]
    place = "" if width == "portable" else "hopper/"
    launch, kernel = f"{place}attention_backward_launch.h", f"{place}attention_backward_bf16.cu"
    library = build.build_changed(folder, {launch: ONLY_THESE[width], header: changes}, kernel)
    said = folder / "said.txt"
    process = CONTEXT.Process(target=find, args=(library, width, 15 if changes else 4, said))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("no result in 300 s")
    return process.exitcode, said.read_text() if said.exists() else ""


@pytest.mark.slow
@pytest.mark.parametrize("width", HEADERS)
def test_without_a_fault_nothing_is_found(width, tmp_path):
    assert run_changed(tmp_path, width, []) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("width, name", ALL_FAULTS)
def test_fault_is_found(width, name, tmp_path):
    status, said = run_changed(tmp_path, width, FAULTS_OF[width][name])
    assert status != 0, "the fault was not found"
    assert "found: " in said.strip().splitlines()[-1] or "attention backward" in said, said
