"""What the project holds itself to on a CPU: each bar, the figure that a run measured for it, and whether it holds."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import geometric_mean, median

from .attention import SDPA
from .job import OURS
from .modules import STOCK
from .norms import EAGER
from .record import Record, best_peer, by_case

Cases = dict[tuple, dict[str, Record]]


@dataclass(frozen=True)
class Bar:
    """measured is None where the run has nothing to judge by. detail: the case that decides, or the spread."""

    name: str
    required: str
    measured: float | None
    holds: bool | None
    detail: str = ""

    def verdict(self) -> str:
        return "not measured" if self.holds is None else "holds" if self.holds else "FALLS SHORT"


def bars(records: Iterable[Record], native_bf16: bool) -> list[Bar]:
    """All bars. native_bf16: whether vectors multiply bfloat16 (AVX512_BF16): there are no bars for tile registers."""
    cases = by_case(records)
    found = [
        _mean_ratio("attention forward over torch SDPA, grid", cases, 2.5, SDPA, _grid("forward")),
        _mean_ratio("attention backward over torch SDPA, grid", cases, 3.0, SDPA, _grid("backward")),
        _worst_ratio(cases),
    ]
    for direction, share in (("forward", 85), ("backward", 80)):
        found.append(_share(f"float32 {direction}, share of FMA peak", cases, share, "float32", direction, 128))
    for direction, share in (("forward", 75), ("backward", 80)):
        name = f"bfloat16 {direction}, share of FMA peak"
        found.append(_share(name, cases if native_bf16 else {}, share, "bfloat16", direction, 256))
    found.append(_pairs("float16 over float32, slowest", cases, 1.0, "float16", lambda c: (c, "float32")))
    found.append(_dropout(cases))
    found.append(_causal(cases))
    for direction in ("forward", "backward"):
        found.append(_bandwidth(cases, direction))
    for direction, least in (("forward", 5.0), ("backward", 1.5)):
        name = f"residual + dropout + LayerNorm {direction} over eager"
        found.append(_mean_ratio(name, cases, least, EAGER, lambda r, d=direction: _is_dropout_norm(r, d)))
    for mode, least in (("training", 1.25), ("eval", 1.1)):
        for dtype in ("float32", "bfloat16"):
            name = f"TransformerEncoderLayer {mode} over torch.nn, {dtype}"
            found.append(_mean_ratio(name, cases, least, STOCK, _layers(mode, dtype)))
    for operation in ("attention", "layer_norm"):
        found.append(_overhead(cases, operation))
    found += [_memory(cases), _scaling(cases)]
    return found


def _grid(direction: str) -> Callable[[Record], bool]:
    return lambda r: r.has("grid") and r.direction == direction


def _layers(mode: str, dtype: str) -> Callable[[Record], bool]:
    return lambda r: r.group == "modules" and r.direction == mode and r.dtype == dtype


def _is_dropout_norm(r: Record, direction: str) -> bool:
    return r.group == "norms" and r.has("dropout") and r.direction == direction


def _ours(cases: Cases, wanted: Callable[[Record], bool]) -> list[Record]:
    return [contenders[OURS] for contenders in cases.values() if OURS in contenders and wanted(contenders[OURS])]


def _at_least(name: str, value: float | None, least: float, unit: str, detail: str = "") -> Bar:
    return Bar(name, f">= {least:g}{unit}", value, None if value is None else value >= least, detail)


def _at_most(name: str, value: float | None, most: float, unit: str, detail: str = "") -> Bar:
    return Bar(name, f"<= {most:g}{unit}", value, None if value is None else value <= most, detail)


def _label(r: Record) -> str:
    return f"{r.case} {r.dtype} {r.direction}"


def _mean_ratio(name: str, cases: Cases, least: float, peer: str, wanted: Callable[[Record], bool]) -> Bar:
    ratios = [c[peer].ratio_to_ours for c in cases.values() if OURS in c and peer in c and wanted(c[OURS])]
    value = geometric_mean(ratios) if ratios else None
    lowest = f", lowest {min(ratios):.2f}" if ratios else ""
    return _at_least(name, value, least, " x", f"geometric mean of {len(ratios)} cases{lowest}")


def _worst_ratio(cases: Cases) -> Bar:
    worst, case = math.inf, ""
    for contenders in cases.values():
        peer = best_peer(contenders)
        if OURS in contenders and contenders[OURS].group == "attention" and peer and peer.ratio_to_ours < worst:
            worst, case = peer.ratio_to_ours, f"{_label(contenders[OURS])}, {peer.contender}"
    return _at_least("attention, the worst case over its best peer", None if not case else worst, 1.0, " x", case)


def _share(name: str, cases: Cases, least: float, dtype: str, direction: str, shortest: int) -> Bar:
    """The grid with D 64 or 128 and at least so many queries; all of it has to hold."""

    def wanted(r: Record) -> bool:
        long_enough = any(w[0] == "S" and w[1:].isdigit() and int(w[1:]) >= shortest for w in r.tags.split())
        return r.has("grid") and r.dtype == dtype and r.direction == direction and long_enough and r.percent_of_fma

    found = _ours(cases, wanted)
    if not found:
        return _at_least(name, None, least, " %")
    lowest = min(found, key=lambda r: r.percent_of_fma)
    detail = f"{_label(lowest)}; median {median(r.percent_of_fma for r in found):.0f} %"
    return _at_least(name, lowest.percent_of_fma, least, " %", detail)


def _pairs(name: str, cases: Cases, most: float, dtype: str, other: Callable) -> Bar:
    worst, detail = -math.inf, ""
    for (group, case, kind, direction), contenders in cases.items():
        if group != "attention" or kind != dtype or OURS not in contenders:
            continue
        other_case, other_dtype = other(case)
        base = cases.get((group, other_case, other_dtype, direction), {}).get(OURS)
        if base and contenders[OURS].median_us / base.median_us > worst:
            worst, detail = contenders[OURS].median_us / base.median_us, _label(contenders[OURS])
    return _at_most(name, worst if detail else None, most, " x", detail)


def _against(cases: Cases, word: str, shortest: int = 0) -> tuple[float | None, str]:
    """The largest time of a case with this word in its name over the same case without it."""
    worst, detail = -math.inf, ""
    for (group, case, dtype, direction), contenders in cases.items():
        base = cases.get((group, case.replace(f" {word}", ""), dtype, direction), {}).get(OURS)
        if group != "attention" or word not in case.split() or OURS not in contenders or not base:
            continue
        if int(case.split()[2].lstrip("S").split("x")[0]) < shortest:
            continue
        ratio = contenders[OURS].median_us / base.median_us
        if ratio > worst:
            worst, detail = ratio, _label(contenders[OURS])
    return (worst if detail else None), detail


def _dropout(cases: Cases) -> Bar:
    worst, detail = _against(cases, "dropout")
    return _at_most("dropout 0.1 over none, slowest", worst, 1.35, " x", detail)


def _causal(cases: Cases) -> Bar:
    worst, detail = _against(cases, "causal", shortest=512)
    return _at_most("causal over full, S >= 512, slowest", worst, 0.6, " x", detail)


def _bandwidth(cases: Cases, direction: str) -> Bar:
    name = f"residual norm {direction} out of cache, share of copy bandwidth"
    found = _ours(cases, lambda r: r.group == "norms" and r.has("memory", "plain") and r.direction == direction)
    if not found:
        return _at_least(name, None, 85, " %")
    lowest = min(found, key=lambda r: r.percent_of_floor)
    detail = f"{_label(lowest)}; median {median(r.percent_of_floor for r in found):.0f} %"
    return _at_least(name, lowest.percent_of_floor, 85, " %", detail)


def _overhead(cases: Cases, operation: str) -> Bar:
    contenders = cases.get(("overhead", operation, "float32", "forward"), {})
    peer = best_peer(contenders)
    value = contenders[OURS].median_us - peer.median_us if peer else None
    return _at_most(f"tiny {operation} without gradient, longer than torch's by", value, 2.0, " us")


def _memory(cases: Cases) -> Bar:
    found = [r for r in _ours(cases, lambda r: r.group == "attention") if r.extra_bytes is not None]
    if not found:
        return _at_most("memory beyond the results", None, 64, " MiB")
    most = max(found, key=lambda r: r.extra_bytes)
    return _at_most("memory beyond the results", most.extra_bytes / 2**20, 64, " MiB", _label(most))


def _scaling(cases: Cases) -> Bar:
    single = [c["one thread"] for c in cases.values() if "one thread" in c]
    if not single or single[0].threads == 1:
        return _at_least("two threads over one", None, 1.8, " x")
    worst = min(single, key=lambda r: r.ratio_to_ours)
    least = 0.9 * worst.threads
    return _at_least(f"{worst.threads} threads over one", worst.ratio_to_ours, least, " x", _label(worst))
