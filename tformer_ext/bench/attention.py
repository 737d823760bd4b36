"""Attention against torch's scaled_dot_product_attention and the eager chain."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout, scaled_dot_product_attention

from .. import functional as F
from .harness import Contender, Options
from .job import DTYPES, OURS, Floor, Job, copy_contender

# Contenders that hold all scores are left out where these would be more elements than this.
MOST_SCORES = 1 << 27
SHORT = 128  # queries up to which moving rows may take longer than arithmetic
SDPA = "torch SDPA"
GPU_BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Problem:
    """Shapes and options of a call. padding: share of the last batch entry's keys that do not count."""

    B: int
    H: int
    S: int
    D: int
    key_heads: int | None = None
    keys: int | None = None
    causal: bool = False
    window: int | None = None  # keys seen to the left, with causal
    padding: float = 0.0
    bias: bool = False  # (1, H, Sq, Sk), trainable
    dropout_p: float = 0.0
    scale: float | None = None
    kind: str = ""

    @property
    def Hk(self) -> int:
        return self.key_heads or self.H

    @property
    def Sk(self) -> int:
        return self.keys or self.S

    def __str__(self) -> str:
        heads = f"{self.H}/{self.Hk}" if self.Hk != self.H else str(self.H)
        length = f"{self.S}x{self.Sk}" if self.Sk != self.S else str(self.S)
        words = [f"B{self.B} H{heads} S{length} D{self.D}", self.kind, "causal" if self.causal else ""]
        return " ".join(word for word in words if word)

    def lengths(self) -> torch.Tensor:
        """(B) keys that count in each batch entry: falling evenly from all to those of the last entry."""
        shares = torch.linspace(0, self.padding, self.B) if self.B > 1 else torch.tensor([self.padding])
        return (self.Sk * (1 - shares)).round().long()

    def pairs(self) -> int:
        """Query-key pairs that may attend, over all batches and query heads."""
        row = torch.arange(self.S).view(1, -1)
        end = self.lengths().view(-1, 1).expand(-1, self.S)
        if self.causal:
            end = torch.minimum(end, row + 1)
        begin = torch.zeros_like(row) if self.window is None else (row - self.window).clamp(min=0)
        return int((end - begin).clamp(min=0).sum()) * self.H

    def floor(self, direction: str, size: int) -> Floor:
        """Two products forward, five backward: 4 D and 10 D operations a pair, and one exponential each. Of elements of
        so many bytes q, k, v and out move, backward their gradients too."""
        moved = 2 * self.B * (self.H * self.S + self.Hk * self.Sk) * self.D * size
        forward = direction == "forward"
        fma = self.pairs() * self.D * (4 if forward else 10)
        return Floor(fma=fma, exp=self.pairs(), bytes=float(moved if forward else 2 * moved))


GRID = [(8, 12, 128, 64), (4, 12, 512, 64), (1, 12, 2048, 64), (1, 16, 4096, 128), (64, 12, 32, 64), (1, 32, 1024, 128)]
MAIN = (4, 12, 512, 64)
VARIANTS = [
    Problem(4, 12, 512, 64, dropout_p=0.1, kind="dropout"),
    Problem(4, 12, 512, 64, dropout_p=0.1, causal=True, kind="dropout"),
    Problem(4, 12, 512, 64, padding=0.5, kind="padding"),
    Problem(4, 12, 512, 64, bias=True, kind="bias"),
    Problem(1, 12, 2048, 64, causal=True, window=256, kind="window"),
    Problem(4, 12, 128, 64, keys=512, kind="cross"),
    Problem(1, 32, 1024, 128, key_heads=8, causal=True, kind="GQA"),
    Problem(8, 32, 1, 128, key_heads=8, keys=2048, kind="decoding"),
    Problem(1, 32, 8, 128, key_heads=8, keys=4096, kind="decoding"),
    Problem(4, 12, 512, 64, scale=2.0, kind="sharp"),  # most weights are tiny
    Problem(8, 12, 256, 32, kind="width"),
    Problem(4, 12, 512, 80, kind="width"),
    Problem(4, 12, 512, 96, kind="width"),
    Problem(2, 12, 512, 256, kind="width"),
]


def jobs() -> Iterator[Job]:
    """The standard grid and its variants."""
    for shape in GRID:
        for causal in (False, True):
            problem = Problem(*shape, causal=causal)
            for dtype in ("float32", "bfloat16"):
                yield from both(problem, dtype, "grid quick" if shape == (8, 12, 128, 64) else "grid")
    for dtype in ("float16", "float64"):
        for shape in ((8, 12, 128, 64), MAIN, (1, 32, 1024, 128)):
            yield from both(Problem(*shape), dtype, "other")
    for problem in VARIANTS:
        for dtype in ("float32", "bfloat16"):
            yield from both(problem, dtype, "variant")


def both(problem: Problem, dtype: str, tags: str) -> Iterator[Job]:
    """The forward and the backward job; of decoding the forward one."""
    directions = ("forward",) if problem.kind == "decoding" else ("forward", "backward")
    words = [tags, problem.kind, f"S{problem.S}", f"D{problem.D}", "causal" if problem.causal else "full"]
    for direction in directions:

        def contenders(options: Options, direction=direction) -> list[Contender]:
            return make_contenders(problem, DTYPES[dtype], direction, options)

        all_tags = " ".join(word for word in words if word)
        floor = problem.floor(direction, DTYPES[dtype].itemsize)
        yield Job("attention", str(problem), dtype, direction, all_tags, contenders, floor)


def make_contenders(problem: Problem, dtype: torch.dtype, direction: str, options: Options) -> list[Contender]:
    """Ours first; each works on the same tensors, in backward with a graph of its own."""
    draw = torch.Generator(options.device).manual_seed(0)
    p, backward = problem, direction == "backward"
    shapes = ((p.B, p.H, p.S, p.D), (p.B, p.Hk, p.Sk, p.D), (p.B, p.Hk, p.Sk, p.D))

    def random(*shape):
        return torch.randn(shape, generator=draw, device=options.device).to(dtype)

    qkv = [random(*shape).requires_grad_(backward) for shape in shapes]
    bias = random(1, p.H, p.S, p.Sk).requires_grad_(backward) if p.bias else None
    calls = {OURS: _ours(p, qkv, bias), SDPA: _sdpa(p, qkv, bias)}
    if options.device == "cuda":
        for name, backend in GPU_BACKENDS.items():
            calls[name] = _with_backend(calls[SDPA], backend)
    if p.B * p.H * p.S * p.Sk <= MOST_SCORES:
        calls["SDPA math"] = _with_backend(calls[SDPA], SDPBackend.MATH)
        calls["eager"] = _eager(p, qkv, bias)
        if options.compile:
            torch.compiler.reset()  # what earlier cases left would count towards the limit of recompilations
            calls["compiled eager"] = torch.compile(calls["eager"])
    leaves = [*qkv, *([bias] if p.bias else [])]
    grad_out = random(p.B, p.H, p.S, p.D)
    made = [contender(name, call, leaves, grad_out, backward) for name, call in calls.items()]
    if p.S <= SHORT and options.device == "cpu":
        made.append(copy_contender(p.floor(direction, dtype.itemsize).bytes, options.device))
    return made


def contender(name: str, call: Callable, leaves: list[torch.Tensor], grads, backward: bool) -> Contender:
    """The call without gradients; or its backward alone, after one forward that is not timed."""
    compiles = name.startswith("compiled")
    if not backward:
        return Contender(name, _without_gradient(call), compiles=compiles)
    graph = []

    def prepare():
        if not graph:
            graph.append(call())

    def run():
        return torch.autograd.grad(graph[0], leaves, grads, retain_graph=True)

    return Contender(name, run, prepare, compiles=compiles)


def _without_gradient(call: Callable) -> Callable:
    def run():
        with torch.no_grad():
            return call()

    return run


def _mask(p: Problem, device: str = "cpu") -> torch.Tensor | None:
    """Bool (B, 1, 1, Sk) of the padding or (Sq, Sk) of the window, for contenders that take no other form of it."""
    if p.padding:
        return (torch.arange(p.Sk) < p.lengths().view(-1, 1)).view(p.B, 1, 1, p.Sk).to(device)
    if p.window is not None:
        distance = torch.arange(p.S).view(-1, 1) - torch.arange(p.Sk)
        return ((distance >= 0) & (distance <= p.window)).to(device)
    return None


def _ours(p: Problem, qkv: list[torch.Tensor], bias: torch.Tensor | None) -> Callable:
    options = {"causal": p.causal, "dropout_p": p.dropout_p, "bias": bias, "scale": p.scale}
    if p.padding:
        options["mask"] = _mask(p, qkv[0].device)
    if p.window is not None:
        options["window"] = (p.window, 0)
    return lambda: F.attention(*qkv, **options)


def _sdpa(p: Problem, qkv: list[torch.Tensor], bias: torch.Tensor | None) -> Callable:
    mask = bias if p.bias else _mask(p, qkv[0].device)
    options = {"attn_mask": mask, "dropout_p": p.dropout_p, "enable_gqa": p.Hk != p.H, "scale": p.scale}
    return lambda: scaled_dot_product_attention(*qkv, is_causal=p.causal and mask is None, **options)


def _with_backend(call: Callable, backend: SDPBackend) -> Callable:
    def run():
        with sdpa_kernel(backend):
            return call()

    return run


def _eager(p: Problem, qkv: list[torch.Tensor], bias: torch.Tensor | None) -> Callable:
    """The chain as a model without a fused kernel writes it."""
    hidden = None if (mask := _mask(p, qkv[0].device)) is None else ~mask
    if p.causal and p.window is None:
        hidden = torch.ones(p.S, p.Sk, dtype=torch.bool, device=qkv[0].device).triu(1)
    scale, group = p.scale or 1 / math.sqrt(p.D), p.H // p.Hk

    def run():
        q, k, v = qkv
        if group > 1:
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * scale
        if bias is not None:
            scores = scores + bias
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        weights = scores.softmax(-1)
        if p.dropout_p:
            weights = dropout(weights, p.dropout_p)
        return weights @ v

    return run
