"""Attention calls that the kernels for sm_90a take, and how their values are checked: by the emulation and on a GPU."""

import torch
from cases import Case, gradients, in_dtype, tensors
from same_maths import forward_yardsticks, yardsticks
from tolerances import assert_close, assert_gradient_close, farther, yardstick_dtype

from tformer_ext import functional as F
from tformer_ext import reference

DTYPES = (torch.bfloat16, torch.float16)
SHAPES = {  # B, Hq, Hk, Sq, Sk, D, Dv
    64: (2, 4, 2, 200, 300, 64, 64),
    128: (2, 4, 2, 140, 300, 128, 128),
    192: (1, 4, 2, 140, 250, 192, 192),
    256: (1, 4, 2, 140, 200, 256, 256),
}
HOPPER_CASES = [
    *(Case(f"{name} {D}", shape, dict(options)) for D, shape in SHAPES.items() for name, options in (
        ("all keys", {}),
        ("causal", {"causal": True}),
        ("lower right", {"causal": "lower_right"}),
        ("window", {"window": (50, 20)}),
    )),
    Case("one tile", (1, 2, 2, 64, 100, 128, 128)),
    Case("whole tiles", (1, 2, 2, 384, 256, 128, 128), {"causal": True}),
    Case("one query", (1, 130, 130, 1, 40, 64, 64)),
    Case("one query of groups", (2, 8, 2, 1, 100, 64, 64), {"causal": "lower_right"}),
    Case("one past the tiles", (1, 3, 1, 193, 113, 64, 64)),
    Case("narrow heads", (1, 2, 2, 70, 150, 8, 24)),
    Case("head dims of two widths", (1, 2, 1, 70, 150, 72, 200)),
    Case("narrower values", (1, 4, 2, 70, 250, 192, 128), {"causal": "lower_right"}),
    Case("just wider than 128", (1, 2, 1, 140, 120, 24, 136)),
    Case("dead rows", (2, 2, 2, 200, 70, 64, 64), {"causal": "lower_right"}),
    Case("tall upper left", (1, 2, 2, 300, 70, 128, 128), {"causal": True}),
    Case("window of one key", (1, 2, 2, 200, 200, 64, 64), {"window": (0, 0)}),
    Case("window past the keys", (1, 2, 2, 200, 60, 64, 64), {"window": (10, -1), "causal": True}),
    Case("key lengths", (4, 2, 1, 70, 260, 64, 64), {"key_lengths": [260, 0, 1, 130]}),
    Case("key lengths lower right", (2, 2, 1, 70, 260, 128, 128), {"key_lengths": [41, 257], "causal": "lower_right"}),
    Case("sinks", (1, 4, 2, 150, 150, 64, 64), {"causal": True}, sinks=True),
    Case("sinks with dead rows", (1, 2, 2, 150, 20, 128, 128), {"causal": "lower_right"}, sinks=True),
    Case("scale", (1, 2, 2, 100, 150, 64, 64), {"scale": 1.0}),
    Case("heads after length", (2, 4, 2, 70, 150, 64, 64), {"causal": True}, layout="BSHD"),
    Case("length first", (2, 4, 4, 70, 150, 64, 64), layout="SBHD"),
    Case("packed projection", (2, 4, 4, 150, 150, 64, 64), {"causal": True}, layout="packed"),
    Case("mask per key", (3, 4, 2, 150, 300, 64, 64), mask=(3, 1, 1, 300)),
    Case("mask per key causal", (2, 4, 2, 150, 300, 128, 128), {"causal": "lower_right"}, mask=(1, 1, 1, 300)),
    Case("mask per key wide", (2, 2, 1, 70, 200, 256, 256), mask=(2, 1, 1, 200)),
    Case("mask per key and head", (2, 4, 2, 70, 150, 128, 128), mask=(2, 4, 1, 150)),
    Case("mask of no key", (2, 2, 1, 70, 150, 64, 64), {"key_lengths": [150, 90]}, mask=(2, 1, 1, 1)),
    *(Case(f"dropout {D}", shape, {"dropout_p": 0.3, "dropout_seed": 2**40 + 7}) for D, shape in SHAPES.items()),
    Case("dropout of groups", (2, 4, 2, 150, 300, 64, 64), {"causal": True, "dropout_p": 0.2, "dropout_seed": -3}),
    Case("dropout, window", (1, 2, 1, 300, 500, 128, 128), {"window": (150, 60), "dropout_p": 0.5, "dropout_seed": 5}),
    Case("dropout of all", (1, 2, 2, 70, 150, 128, 128), {"dropout_p": 1.0, "dropout_seed": 1}),
    Case("dropout, sinks", (1, 4, 2, 150, 150, 64, 64), {"dropout_p": 0.1, "dropout_seed": 9}, sinks=True),
    *(Case(f"bias {D}", shape, bias=(*shape[:2], *shape[3:5])) for D, shape in SHAPES.items()),
    Case("bias over batches causal", (2, 4, 2, 200, 300, 64, 64), {"causal": True}, bias=(1, 4, 200, 300)),
    Case("bias over heads", (2, 4, 2, 140, 300, 128, 128), {"causal": "lower_right"}, bias=(2, 1, 140, 300)),
    Case("bias over both wide", (2, 2, 1, 70, 200, 256, 256), {"window": (50, 20)}, bias=(70, 200)),
    Case("bias per key", (2, 4, 2, 150, 300, 128, 128), {"window": (50, 20)}, bias=(2, 1, 1, 300)),
    Case("bias, key lengths", (4, 2, 1, 70, 260, 64, 64), {"key_lengths": [260, 0, 1, 130]}, bias=(4, 2, 70, 260)),
    Case("bias, mask per key", (2, 4, 2, 150, 300, 64, 64), mask=(2, 1, 1, 300), bias=(1, 4, 150, 300)),
    Case("bias, dead rows", (2, 2, 2, 200, 70, 64, 64), {"causal": "lower_right"}, bias=(2, 2, 200, 70)),
    Case("bias, sinks", (1, 4, 2, 150, 150, 64, 64), {"causal": True}, bias=(1, 4, 150, 150), sinks=True),
    Case("bias of one query", (2, 8, 2, 1, 100, 64, 64), {"causal": "lower_right"}, bias=(2, 8, 1, 100)),
    Case("many key tiles", (1, 2, 1, 70, 500, 256, 256), {"causal": "lower_right", "window": (400, -1)}),
]  # fmt: skip


def check_values(case, dtype):
    """out and lse of the call against float64."""
    torch.manual_seed(1)
    qkv, options = tensors(case, dtype)
    exact, exact_options = in_dtype(qkv, options, torch.float64)
    golden = reference.attention(*exact, **exact_options, return_lse=True)
    same = zip(*forward_yardsticks(qkv, options, yardstick_dtype(dtype)), strict=True)
    actual = F.attention(*qkv, **options, return_lse=True)
    for name, a, g, f in zip(("out", "lse"), actual, golden, same, strict=True):
        assert_close(a, g, farther(f, g), f"{dtype} {name}")


# Tiles are 128 keys by 64 queries, up to width 64 by 128; above 128 they are 64 by 64.
BACKWARD_CASES = [
    # backward has one width above 128
    *(case for case in HOPPER_CASES if case.name != "mask per key and head" and not case.name.endswith("192")),
    Case("several tiles", (1, 2, 1, 300, 400, 128, 128)),
    Case("several tiles causal", (1, 2, 2, 400, 400, 64, 64), {"causal": True}),
    Case("eight heads of queries", (1, 8, 1, 70, 150, 128, 128), {"causal": "lower_right"}),
    Case("keys nobody sees", (1, 2, 2, 60, 400, 64, 64), {"causal": True}),
    Case("window over several tiles", (1, 2, 1, 500, 500, 128, 128), {"window": (150, 60)}),
    Case("causal window over several tiles", (1, 2, 1, 500, 500, 64, 64), {"window": (100, -1), "causal": True}),
    Case("window right only", (1, 2, 1, 300, 300, 64, 64), {"window": (-1, 10)}),
    Case("window left only", (1, 2, 1, 300, 300, 64, 64), {"window": (10, -1)}),
    Case("all keys hidden", (2, 2, 1, 70, 150, 128, 128), {"key_lengths": [0, 0]}),
    Case("bias over several tiles", (1, 2, 1, 300, 400, 128, 128), bias=(1, 2, 300, 400)),
    Case("bias over several tiles causal", (1, 4, 2, 400, 400, 64, 64), {"causal": True}, bias=(1, 4, 400, 400)),
    Case("bias, window", (1, 2, 2, 300, 300, 128, 128), {"window": (100, 40)}, bias=(1, 2, 300, 300)),
    Case("wide several tiles", (1, 2, 1, 300, 280, 256, 256)),
    Case("wide several tiles causal", (1, 2, 2, 260, 260, 256, 256), {"causal": True}),
    Case("wide eight heads of queries", (1, 8, 1, 70, 150, 256, 256), {"causal": "lower_right"}),
    Case("wide window over several tiles", (1, 2, 1, 300, 300, 256, 256), {"window": (100, 40)}),
    Case("wide values narrow", (1, 2, 1, 130, 150, 192, 64), {"causal": True}),
    Case("wide keys narrow", (1, 2, 1, 130, 150, 24, 136), {"causal": "lower_right"}),
    Case("wide keys nobody sees", (1, 2, 2, 60, 200, 256, 256), {"causal": True}),
    Case("wide one query", (1, 4, 2, 1, 100, 192, 192), {"causal": "lower_right"}),
    Case("wide whole tiles", (1, 2, 2, 128, 192, 136, 256), {"causal": True}),
    Case("wide one past the tiles", (1, 2, 1, 129, 65, 256, 200)),
    Case("wide dead rows", (2, 2, 2, 150, 70, 256, 256), {"causal": "lower_right"}),
    Case("wide key lengths", (4, 2, 1, 70, 150, 192, 192), {"key_lengths": [150, 0, 1, 65]}),
    Case("wide all keys hidden", (2, 2, 1, 70, 150, 256, 256), {"key_lengths": [0, 0]}),
    Case("wide sinks", (1, 4, 2, 150, 150, 256, 256), {"causal": True}, sinks=True),
    Case("wide dropout of groups", (1, 4, 2, 130, 150, 256, 192), {"dropout_p": 0.2, "dropout_seed": -3}),
    Case("wide heads after length", (2, 4, 2, 70, 150, 256, 256), {"causal": True}, layout="BSHD"),
]


def backward_inputs(case, dtype):
    """(query, key, value), keywords, cotangents of out and lse."""
    torch.manual_seed(1)
    qkv, options = tensors(case, dtype)
    B, Hq, _, Sq, _, _, Dv = case.shape
    return qkv, options, (torch.randn(B, Hq, Sq, Dv).to(dtype), torch.randn(B, Hq, Sq))


def check_gradients(case, dtype):
    """Gradients of query, key, value, bias and sinks, by out and lse, against float64."""
    qkv, options, cotangents = backward_inputs(case, dtype)
    golden = gradients(reference.attention, *in_dtype(qkv, options, torch.float64, True), cotangents)[1]
    same = list(zip(*yardsticks(qkv, options, cotangents, dtype), strict=True))[2:]
    actual = gradients(F.attention, *in_dtype(qkv, options, dtype, True), cotangents)[1]
    names = ("query", "key", "value", *(name for name in ("bias", "sinks") if name in options))
    for name, a, g, f in zip(names, actual, golden, same, strict=True):
        assert_gradient_close(a, g, farther(f, g), f"{dtype} gradient of {name}")
