"""explain tells what a call takes, and why not something faster."""

import pytest
import torch

import tformer_ext as tx
from tformer_ext import _C
from tformer_ext import functional as F


def test_names_the_isa_in_force(isa):
    q = torch.randn(1, 2, 5, 8)
    told = tx.explain(q, q, q)
    assert told.isa == isa and told.vector_bytes == _C.vector_bytes() in (16, 32, 64)
    assert isa in str(told) and "float32" in str(told)
    assert any("was chosen" in note for note in told.notes) == (isa != _C.supported_isas()[-1])


def test_bf16(isa):
    q = torch.randn(1, 2, 5, 8).bfloat16()
    told = tx.explain(q, q, q)
    assert ("vdpbf16ps" in told.product) == (isa == "avx512bf16")
    assert ("tdpbf16ps" in told.product) == (isa == "amxbf16")
    assert ("BFMMLA" in told.product) == (isa == "neonbf16")
    assert any("float32 speed" in note for note in told.notes) == (not isa.endswith("bf16"))


SPLIT = [
    (torch.float32, 512, {}, True, False),
    (torch.float32, 1024, {}, True, True),
    (torch.float32, 1024, {"causal": True}, True, False),
    (torch.float32, 512, {"causal": True}, False, False),
    (torch.float32, 2048, {"window": (100, 0)}, False, False),
    (torch.float16, 128, {}, True, True),
    (torch.float32, 128, {}, False, False),
    (torch.float64, 512, {}, False, False),
    (torch.bfloat16, 512, {}, False, False),
]


@pytest.mark.parametrize("dtype, length, options, forward, backward", SPLIT)
def test_products_of_slices(dtype, length, options, forward, backward, isa):
    q = torch.empty(1, 1, length, 64, dtype=dtype)
    told = tx.explain(q, q, q, **options)
    can = isa == "amxbf16"
    assert ("slices" in told.product) == (can and forward)
    assert any("backward is too small" in note for note in told.notes) == (can and forward and not backward)


def test_copies_and_bias():
    q = torch.randn(1, 2, 8, 5).transpose(2, 3)
    bias = torch.randn(5, 5, requires_grad=True)
    text = str(tx.explain(q, q.contiguous(), q.contiguous(), bias=bias))
    assert "query is copied" in text and "key is copied" not in text and "bias" in text


def test_checks_its_arguments():
    with pytest.raises(ValueError, match="query"):
        tx.explain(torch.randn(3), torch.randn(3), torch.randn(3))


def test_checks_its_options():
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="causal"):
        tx.explain(q, q, q, causal="sideways")
    with pytest.raises(TypeError, match="no_such_option"):
        tx.explain(q, q, q, no_such_option=1)


S = 12
CAUSAL = torch.ones(S, S).tril().bool()
KEPT = (torch.arange(S) < torch.tensor([12, 7])[:, None])[:, None, None]  # (B, 1, 1, Sk), padding at the end
LEFT = KEPT.flip(3)
# mask -> (what is said, the same in other words)
MASKS = {
    "causal": (CAUSAL, 'causal="upper_left"', {"causal": True}),
    "decoding": (CAUSAL[7:], 'causal="lower_right"', {"causal": "lower_right"}),
    "window": (CAUSAL.triu(-3), 'causal="upper_left", window=(3, 0)', {"causal": True, "window": (3, 0)}),
    "band": (torch.ones(S, S).tril(2).triu(-3).bool(), "window=(3, 2)", {"window": (3, 2)}),
    "padded": (KEPT.expand(2, 1, S, S).contiguous(), "key_lengths", {"key_lengths": torch.tensor([12, 7])}),
    "one row": (KEPT, "key_lengths", {"key_lengths": torch.tensor([12, 7])}),
    "padded on the left": (LEFT.expand(2, 1, S, S).contiguous(), "a mask of shape (2, 1, 1, 12)", {"mask": LEFT}),
    "causal and padded": (
        CAUSAL & KEPT, 'causal="upper_left", key_lengths', {"causal": True, "key_lengths": torch.tensor([12, 7])},
    ),
    "band and padded": (
        torch.ones(S, S).tril(2).triu(-3).bool() & KEPT, "window=(3, 2), a mask of shape (2, 1, 1, 12)",
        {"window": (3, 2), "mask": KEPT},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_masks_that_positions_say(name, kind):
    mask, said, same = MASKS[name]
    operand = mask if kind == "mask" else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    q = torch.randn(2, 2, mask.shape[-2] if mask.shape[-2] > 1 else S, 8)
    k = torch.randn(2, 2, S, 8)
    notes = tx.explain(q, k, k, **{kind: operand}).notes
    assert f"{kind} {tuple(mask.shape)} only hides keys; pass {said} instead" in notes
    torch.testing.assert_close(F.attention(q, k, k, **same), F.attention(q, k, k, **{kind: operand}))


def test_other_masks():
    def notes(**options):
        q = torch.randn(2, 2, S, 8)
        return [note for note in tx.explain(q, q, q, **options).notes if "only hides" in note]

    assert notes(mask=torch.ones(S, S).bool()) == [f"mask {(S, S)} only hides keys; it hides none: leave it out"]
    random = torch.rand(2, 1, S, S) > 0.5
    assert not notes(mask=random) and not notes(mask=LEFT) and not notes(bias=torch.randn(S, S))
    assert "mask= takes it as bool" in notes(bias=torch.zeros(S, S).masked_fill(~random[0, 0], -torch.inf))[0]


def test_shapes(threads):
    threads(1)
    q = torch.randn(1, 2, 5, 300).double()
    text = str(tx.explain(q, q, q, dropout_p=0.1))
    assert "head dimension 300" in text and "float64" in text and "dropout" in text
    assert text.startswith("attention of float64: query (1, 2, 5, 300), key (1, 2, 5, 300)")
    threads(3)
    assert "less work than there are threads" in str(tx.explain(q, q, q))


def test_explain_calls():
    module, x = tx.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 4, 8)
    expected = module(x, x, x)[0]
    with tx.explain_calls() as calls:
        torch.testing.assert_close(module(x, x, x)[0], expected)
        module(x, x, x, need_weights=False)
    module(x, x, x)
    assert len(calls) == 2 and all("query (1, 2, 4, 4)" in str(call) for call in calls)
    with pytest.raises(RuntimeError, match="stop"), tx.explain_calls():
        raise RuntimeError("stop")
    with tx.explain_calls() as calls:
        pass
    module(x, x, x)
    assert not calls
