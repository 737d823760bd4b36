"""The cases for a GPU, and what is said of them last."""

from collections.abc import Iterable, Iterator
from statistics import geometric_mean

import torch
from rich.console import Console
from rich.table import Table

from ..arguments import has_cuda_kernels
from ..explain import explain
from . import attention, norms
from .job import OURS, Job
from .record import Record, best_peer, by_case

# 16 k tokens of 2048 features, as most published figures have it: (head dimension, lengths).
LENGTHS = {64: (512, 4096), 128: (512, 2048, 8192), 256: (2048,)}
VARIANTS = [
    attention.Problem(4, 16, 2048, 128, dropout_p=0.1, kind="dropout"),
    attention.Problem(4, 16, 2048, 128, padding=0.5, kind="padding"),
    attention.Problem(1, 16, 2048, 128, bias=True, kind="bias"),
    attention.Problem(2, 16, 8192, 128, causal=True, window=1024, kind="window"),
    attention.Problem(4, 32, 2048, 128, key_heads=8, causal=True, kind="GQA"),
    attention.Problem(16, 32, 1, 128, key_heads=8, keys=8192, kind="decoding"),
    attention.Problem(32, 12, 197, 64, kind="short"),
    attention.Problem(8, 10, 2048, 192, kind="width"),
]
# What about() says of attention where its kernels for sm_90a are asked for.
SM90A = "sm_90a kernels"
ROWS = [(65536, 768), (16384, 4096), (8192, 8192)]


def jobs() -> Iterator[Job]:
    """Of the operations that this build has CUDA kernels of."""
    if has_cuda_kernels("attention"):
        for D, lengths in LENGTHS.items():
            for S in lengths:
                for causal in (False, True):
                    problem = attention.Problem(16384 // S, 2048 // D, S, D, causal=causal)
                    yield from attention.both(problem, "bfloat16", "grid quick" if S == 2048 else "grid")
        for problem in VARIANTS:
            yield from attention.both(problem, "bfloat16", "variant")
        for dtype in ("float16", "float32"):
            yield from attention.both(attention.Problem(8, 16, 2048, 128), dtype, "other")
    if has_cuda_kernels("residual_norm"):
        for M, N in ROWS:
            for problem in (
                norms.Problem(M, N),
                norms.Problem(M, N, dropout_p=0.1, return_residual=True),
                norms.Problem(M, N, return_residual=True, rms=True),
            ):
                for dtype in ("float32", "bfloat16"):
                    for direction in ("forward", "backward"):
                        yield norms.job(problem, dtype, direction)


def about() -> dict[str, str]:
    """What identifies the GPU."""
    properties = torch.cuda.get_device_properties(0)
    plain = torch.empty(1, 1, 128, 128, dtype=torch.bfloat16, device="cuda")
    warpgroups = has_cuda_kernels("attention") and "wgmma" in explain(plain, plain, plain).product
    return {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "gpu memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "attention": SM90A if warpgroups else "portable kernels",
    }


def print_summary(console: Console, records: Iterable[Record]) -> None:
    """A line for each kind of case: ours against the best peer of each case, and the share of the floor."""
    groups: dict[tuple, list[dict[str, Record]]] = {}
    for contenders in by_case(records).values():
        ours = contenders[OURS]
        kind = next((word for word in ("grid", "variant", "other") if ours.has(word)), "")
        groups.setdefault((ours.group, kind, ours.dtype, ours.direction), []).append(contenders)
    columns = ("group", "", "dtype", "", "cases", "best peer / ours", "least", "floor %")
    table = Table(*columns, title="summary, geometric means", title_justify="left")
    for (group, kind, dtype, direction), cases in groups.items():
        ratios = [best.ratio_to_ours for c in cases if (best := best_peer(c))]
        shares = [c[OURS].percent_of_floor for c in cases if c[OURS].percent_of_floor]
        cells = [f"{geometric_mean(ratios):.2f}", f"{min(ratios):.2f}"] if ratios else ["", ""]
        share = f"{geometric_mean(shares):.0f}" if shares else ""
        table.add_row(group, kind, dtype, direction, str(len(cases)), *cells, share)
    console.print(table)
