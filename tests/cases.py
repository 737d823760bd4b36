"""Named attention calls: each is here for the reason in its name."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    """Shapes and keywords of one attention call; `operands` names random tensors to make, by their shape."""

    name: str
    shape: tuple  # B, Hq, Hk, Sq, Sk, D, Dv
    options: dict = field(default_factory=dict)
    bias: tuple | None = None
    mask: tuple | None = None
    alibi: str | None = None
    sinks: bool = False
    layout: str = "BHSD"

    def __str__(self):
        return self.name.replace(" ", "_")


BASE = (2, 2, 2, 33, 70, 16, 16)
CASES = [
    Case("one element", (1, 1, 1, 1, 1, 1, 1)),
    Case("one key", (2, 2, 2, 5, 1, 64, 64)),
    Case("one query of decoding", (2, 4, 2, 1, 131, 64, 64), {"causal": "lower_right"}),
    Case("one query of groups larger than tiles", (1, 260, 2, 1, 40, 16, 16), {"causal": "lower_right"}),
    Case("prime sizes", (3, 5, 5, 17, 31, 13, 7)),
    Case("whole tiles", (1, 2, 2, 96, 128, 64, 64)),
    Case("one past the tiles", (1, 2, 2, 97, 129, 65, 33)),
    Case("head dim 3", (1, 2, 2, 20, 20, 3, 3)),
    Case("head dim 80", (1, 2, 2, 40, 40, 80, 80)),
    Case("head dim 96 values 256", (1, 1, 1, 40, 70, 96, 256)),
    Case("head dim 256", (1, 1, 1, 30, 66, 256, 128)),
    Case("grouped queries", (2, 8, 2, 40, 50, 32, 32), {"causal": True}),
    Case("one key head", (1, 6, 1, 40, 50, 32, 32)),
    Case("causal upper left wide", (2, 2, 2, 40, 100, 16, 16), {"causal": "upper_left"}),
    Case("causal upper left tall", (2, 2, 2, 100, 40, 16, 16), {"causal": True}),
    Case("causal lower right wide", (2, 2, 2, 40, 100, 16, 16), {"causal": "lower_right"}),
    Case("causal lower right tall has dead rows", (2, 2, 2, 100, 40, 16, 16), {"causal": "lower_right"}),
    Case("window", (2, 2, 2, 150, 150, 16, 16), {"window": (20, 5)}),
    Case("window left only", (1, 2, 2, 60, 90, 16, 16), {"window": (7, -1)}),
    Case("window right only", (1, 2, 2, 60, 90, 16, 16), {"window": (-1, 3)}),
    Case("window causal", (1, 2, 2, 150, 150, 16, 16), {"window": (30, 9), "causal": True}),
    Case("window of one key", (1, 2, 2, 60, 60, 16, 16), {"window": (0, 0)}),
    Case("alibi per head", BASE, {"causal": True}, alibi="H"),
    Case("alibi per batch and head", BASE, alibi="BH"),
    Case("sinks", BASE, {"causal": True}, sinks=True),
    Case("sinks with dead rows", (1, 2, 2, 60, 20, 16, 16), {"causal": "lower_right"}, sinks=True),
    Case("key lengths with none", (3, 2, 2, 33, 70, 16, 16), {"key_lengths": [70, 0, 41]}),
    Case("key lengths lower right", (2, 2, 2, 10, 70, 16, 16), {"key_lengths": [70, 41], "causal": "lower_right"}),
    Case("softcap", BASE, {"softcap": 3.0}),
    Case("scale 1", BASE, {"scale": 1.0}),
    Case("scale negative", BASE, {"scale": -0.5}),
    Case("scale 0", BASE, {"scale": 0.0}),
    Case("bias full", BASE, bias=(2, 2, 33, 70)),
    Case("bias over batches", BASE, bias=(1, 2, 33, 70)),
    Case("bias over heads", BASE, bias=(2, 1, 33, 70)),
    Case("bias over both", BASE, bias=(33, 70)),
    Case("bias per key", BASE, bias=(2, 1, 1, 70)),
    Case("bias per key for all", BASE, bias=(1, 1, 1, 70)),
    Case("bias per query", BASE, bias=(1, 2, 33, 1)),
    Case("bias per head", BASE, bias=(1, 2, 1, 1)),
    Case("bias over query groups", (2, 4, 2, 100, 130, 16, 16), bias=(1, 4, 100, 130)),
    Case("mask full", BASE, mask=(2, 2, 33, 70)),
    Case("mask per key", BASE, mask=(2, 1, 1, 70)),
    Case("mask per query", BASE, mask=(2, 1, 33, 1)),
    Case("mask two dims", BASE, mask=(33, 70)),
    Case("dropout", (2, 4, 2, 33, 130, 16, 16), {"dropout_p": 0.3, "dropout_seed": 12345}),
    Case("dropout causal", (1, 2, 2, 70, 70, 16, 16), {"dropout_p": 0.5, "dropout_seed": -7, "causal": True}),
    Case("dropout of all", BASE, {"dropout_p": 1.0, "dropout_seed": 1}),
    Case("packed projection", (2, 4, 4, 40, 40, 16, 16), {"causal": True}, layout="packed"),
    Case("heads after length", (2, 4, 2, 40, 50, 16, 16), layout="BSHD"),
    Case("length first", (2, 4, 4, 40, 50, 16, 16), layout="SBHD"),
    Case("one batch for all", (3, 2, 2, 20, 30, 16, 16), layout="expanded"),
    Case(
        "everything", (2, 4, 2, 70, 90, 24, 40),
        {"causal": "lower_right", "window": (50, -1), "softcap": 4, "scale": 0.3, "dropout_p": 0.2, "dropout_seed": 9},
        bias=(1, 4, 70, 90), mask=(2, 1, 70, 90), alibi="H", sinks=True, layout="BSHD",
    ),
    Case("several heads of a task", (9, 6, 3, 33, 40, 24, 16), {"key_lengths": [40, 3, 0, 21, 40, 9, 40, 1, 17]}),
    Case("several parts of the keys", (2, 6, 2, 3, 1500, 32, 40), {"causal": "lower_right"}, sinks=True),
    Case("several parts with one query", (2, 16, 2, 1, 1100, 33, 16), {"key_lengths": [1100, 450]}),
    Case("several parts none seen", (1, 2, 2, 8, 1300, 16, 16), {"window": (600, 2), "softcap": 9.0}, mask=(8, 1300)),
    Case("several parts with dropout", (1, 2, 1, 5, 1300, 9, 9), {"dropout_p": 0.2, "dropout_seed": 5}, bias=(5, 1300)),
    Case("few rows of several parts", (2, 8, 2, 1, 1100, 64, 64), {"key_lengths": [1100, 450]}, layout="BSHD"),
    Case("few rows of contiguous heads", (1, 6, 2, 1, 1103, 40, 96), {"key_lengths": [1101]}),
    Case("few rows of odd sizes", (1, 4, 2, 3, 1503, 33, 40), {"causal": "lower_right"}, sinks=True, layout="packed"),
    Case(
        "few rows with everything", (1, 2, 2, 4, 1300, 9, 16),
        {"causal": "lower_right", "window": (900, 0), "softcap": 9.0, "dropout_p": 0.2, "dropout_seed": 5},
        bias=(4, 1300), mask=(1, 2, 4, 1300), alibi="H",
    ),
    Case("rising scores", (1, 2, 2, 20, 300, 16, 16), {"scale": 6.0}),
    Case("several key ranges", (1, 2, 1, 40, 2500, 32, 32), {"causal": "lower_right"}),
    Case("several key ranges with mask", (1, 1, 1, 13, 2500, 64, 64), mask=(1, 1, 1, 2500), bias=(1, 1, 13, 2500)),
]  # fmt: skip


def _laid_out(layout, B, H, S, D, dtype):
    if layout == "BSHD":
        return torch.randn(B, S, H, D, dtype=dtype).transpose(1, 2)
    if layout == "SBHD":
        return torch.randn(S, B, H, D, dtype=dtype).permute(1, 2, 0, 3)
    if layout == "packed":
        return torch.randn(B, S, 3, H, D, dtype=dtype)[:, :, 1].transpose(1, 2)
    if layout == "expanded":
        return torch.randn(1, H, S, D, dtype=dtype).expand(B, -1, -1, -1)
    return torch.randn(B, H, S, D, dtype=dtype)


def tensors(case, dtype):
    """(query, key, value) and keywords; the values are exact in dtype."""
    B, Hq, Hk, Sq, Sk, D, Dv = case.shape
    qkv = [_laid_out(case.layout, *shape, dtype) for shape in ((B, Hq, Sq, D), (B, Hk, Sk, D), (B, Hk, Sk, Dv))]
    options = dict(case.options)
    if case.bias:
        options["bias"] = torch.randn(case.bias, dtype=dtype)
    if case.mask:
        options["mask"] = torch.rand(case.mask) > 0.4
    if case.alibi:
        options["alibi_slopes"] = torch.rand((Hq,) if case.alibi == "H" else (B, Hq))
    if case.sinks:
        options["sinks"] = torch.randn(Hq, dtype=dtype)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"], dtype=torch.int32)
    return qkv, options


FLOATING = ("bias", "sinks")  # keywords with a gradient


def in_dtype(qkv, options, dtype, requires_grad=False):
    """The same call in another dtype, as fresh leaves that keep their strides."""

    def cast(t):
        return t.detach().to(dtype).requires_grad_(requires_grad)

    return [cast(t) for t in qkv], {k: cast(v) if k in FLOATING else v for k, v in options.items()}


def gradients(function, qkv, options, cotangents):
    """Outputs (out, lse) of function and gradients of query, key, value, bias, sinks for the given cotangents."""
    out, lse = function(*qkv, **options, return_lse=True)
    leaves = [*qkv, *(options[k] for k in FLOATING if k in options)]
    alive = torch.where(lse == -torch.inf, 0, lse)
    loss = (out * cotangents[0].to(out.dtype)).sum() + (alive * cotangents[1].to(lse.dtype)).sum()
    return (out, lse), torch.autograd.grad(loss, leaves)
