"""The reference against torch, against brute force, and by finite differences: it is what all else is measured by."""

import pytest
import torch
from cases import CASES, FLOATING, in_dtype, tensors

from tformer_ext import reference
from tformer_ext.reference.philox import philox


def test_philox_known_answers():
    """Random123's published vectors of philox4x32-10 (kat_vectors)."""
    assert [int(w) for w in philox((0, 0, 0, 0), 0, rounds=10)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    answer = [int(w) for w in philox((ones,) * 4, -1, rounds=10)]
    assert answer == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    seed = 0x299F31D0_A4093822
    answer = [int(w) for w in philox(pi, seed, rounds=10)]
    assert answer == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_philox_against_integers():
    def integers(c, k):
        for _ in range(7):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    seed = 0x1234_5678_9ABC_DEF0
    for counter in ((1, 2, 3, 4), (2**32 - 1, 0, 7, 2**31), (5, 2**32 - 1, 2**32 - 1, 9)):
        assert [int(w) for w in philox(counter, seed)] == integers(list(counter), [0x9ABCDEF0, 0x12345678])


@pytest.mark.parametrize("causal", [False, "upper_left", "lower_right"])
@pytest.mark.parametrize("window", [None, (2, 1), (-1, 0), (3, -1), (0, 0)])
def test_visible_keys_by_brute_force(causal, window):
    lengths = [7, 3, 0]
    Sq, Sk = 5, 7
    mask, _ = reference.visible_keys(Sq, Sk, causal=causal, window=window, key_lengths=lengths)
    left, right = window or (-1, -1)
    for b, length in enumerate(lengths):
        offset = 0 if causal == "upper_left" else length - Sq
        for i in range(Sq):
            for j in range(Sk):
                seen = j < length
                seen &= not causal or j <= i + offset
                seen &= left < 0 or j >= i + offset - left
                seen &= right < 0 or j <= i + offset + right
                assert bool(mask[b, 0, i, j]) == seen, (b, i, j)


@pytest.mark.parametrize("Sq, Sk", [(9, 9), (5, 12), (12, 5)])
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "gqa"])
def test_agrees_with_torch(Sq, Sk, kind):
    query = torch.randn(2, 4, Sq, 8, dtype=torch.float64)
    heads = 2 if kind == "gqa" else 4
    key, value = torch.randn(2, heads, Sk, 8, dtype=torch.float64), torch.randn(2, heads, Sk, 6, dtype=torch.float64)
    ours, torchs = {}, {}
    if kind == "causal":
        ours, torchs = {"causal": True}, {"is_causal": True}
    if kind == "bool":
        mask = torch.rand(2, 1, Sq, Sk) > 0.3
        ours, torchs = {"mask": mask}, {"attn_mask": mask}
    if kind == "float":
        bias = torch.randn(4, Sq, Sk, dtype=torch.float64)
        ours, torchs = {"bias": bias}, {"attn_mask": bias}
    if kind == "gqa":
        torchs = {"enable_gqa": True}
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, **torchs)
    torch.testing.assert_close(reference.attention(query, key, value, **ours), expected, rtol=1e-12, atol=1e-13)


def test_norms_agree_with_torch():
    x, residual, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((6, 9), (6, 9), (9,), (9,)))
    torch.testing.assert_close(
        reference.residual_layer_norm(x, residual, weight, bias, eps=1e-3),
        torch.nn.functional.layer_norm(x + residual, (9,), weight, bias, 1e-3),
    )
    torch.testing.assert_close(
        reference.residual_rms_norm(x, residual, weight, eps=1e-3),
        torch.nn.functional.rms_norm(x + residual, (9,), weight, 1e-3),
    )


@pytest.mark.parametrize("case", [c for c in CASES if max(c.shape) <= 40 and c.layout != "expanded"], ids=str)
def test_derivatives(case):
    qkv, _ = tensors(case, torch.float64)
    leaves, _ = in_dtype([t[:2, :, :5, :6] for t in qkv], {}, torch.float64, True)
    assert torch.autograd.gradcheck(lambda *t: reference.attention(*t, causal=True, softcap=3.0), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: reference.attention(*t, causal=True), leaves)


def test_bias_and_sinks_have_derivatives():
    q, k, v = (torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert FLOATING == ("bias", "sinks")

    def run(q, k, v, bias, sinks):
        return reference.attention(q, k, v, bias=bias, sinks=sinks, causal=True, return_lse=True)

    assert torch.autograd.gradcheck(run, (q, k, v, bias, sinks))
