"""explain tells what a call takes, and why not something faster."""

import pytest
import torch

import tformer_ext as tx
from tformer_ext import _C


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
    assert any("float32 speed" in note for note in told.notes) == (isa != "avx512bf16")


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
