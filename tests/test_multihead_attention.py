"""MultiheadAttention against torch.nn.MultiheadAttention: constructor, parameters, forward, errors."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import tformer_ext as tx

E, H, L, S, N = 12, 3, 5, 7, 4
CONSTRUCTORS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "kdim vdim": {"kdim": 8, "vdim": 6, "batch_first": True},
    "bias kv": {"add_bias_kv": True},
    "zero attn": {"add_zero_attn": True, "batch_first": True},
    "both rows": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "bias kv without bias": {"add_bias_kv": True, "bias": False},
}


def pair(**options):
    torch.manual_seed(3)
    stock = nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(3)
    ours = tx.MultiheadAttention(E, H, **options)
    return ours, stock


def inputs(batch_first=False, kdim=E, vdim=E, dtype=torch.float32, batched=True):
    lead = (N,) if batched else ()
    tensors = [torch.randn(*lead, n, d, dtype=dtype) for n, d in ((L, E), (S, kdim), (S, vdim))]
    return tensors if batch_first or not batched else [t.transpose(0, 1).contiguous() for t in tensors]


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_parameters(name):
    ours, stock = pair(**CONSTRUCTORS[name])
    a, b = ours.state_dict(), stock.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert repr(ours) == repr(stock) and isinstance(ours, nn.MultiheadAttention)
    ours.load_state_dict(b)


def masks(kind):
    if kind == "bool":
        return torch.rand(L, S) > 0.7
    if kind == "float":
        return torch.randn(L, S)
    if kind == "bool 3d":
        return torch.rand(N * H, L, S) > 0.7
    return torch.randn(N * H, L, S) if kind == "float 3d" else None


def open_rows(mask):
    """No row fully masked: there torch gives NaN."""
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = False
    return mask


@pytest.mark.parametrize("name", CONSTRUCTORS)
@pytest.mark.parametrize("mask", [None, "bool", "float", "bool 3d", "float 3d"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_forward(name, mask, padding, need_weights):
    options = CONSTRUCTORS[name]
    ours, stock = pair(**options)
    tensors = inputs(options.get("batch_first", False), options.get("kdim", E), options.get("vdim", E))
    kwargs = {"need_weights": need_weights, "attn_mask": open_rows(masks(mask)), "average_attn_weights": mask != "bool"}
    if padding:
        hidden = torch.arange(S) >= torch.tensor([S, 3, 5, 1])[:, None]
        kwargs["key_padding_mask"] = hidden if padding == "bool" else torch.zeros(N, S).masked_fill(hidden, -torch.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, actual = stock(*tensors, **kwargs), ours(*tensors, **kwargs)
    torch.testing.assert_close(actual[0], expected[0])
    assert (actual[1] is None) == (expected[1] is None) == (not need_weights)
    if need_weights:
        torch.testing.assert_close(actual[1], expected[1])


@pytest.mark.parametrize("shared", ["all", "key and value"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_shared_inputs_and_gradients(shared, batch_first, training):
    ours, stock = pair(batch_first=batch_first)
    ours.train(training), stock.train(training)
    results = []
    for module in (ours, stock):
        torch.manual_seed(4)
        q, k, _ = (t.requires_grad_() for t in inputs(batch_first))
        arguments = (k, k, k) if shared == "all" else (q, k, k)
        out, weights = module(*arguments)
        ((out.square()).sum() + weights.square().sum()).backward()
        results.append([out, weights, k.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
def test_unbatched(need_weights):
    for batch_first in (False, True):
        ours, stock = pair(batch_first=batch_first)
        tensors = inputs(batched=False)
        kwargs = {"key_padding_mask": torch.arange(S) > 4, "attn_mask": torch.rand(H, L, S) > 0.9}
        kwargs["attn_mask"][..., 0] = False
        for average in (False, True):
            more = {"need_weights": need_weights, "average_attn_weights": average}
            a, b = ours(*tensors, **kwargs, **more), stock(*tensors, **kwargs, **more)
            torch.testing.assert_close(a[0], b[0])
            if need_weights:
                torch.testing.assert_close(a[1], b[1])


def test_is_causal():
    ours, stock = pair(batch_first=True)
    x = torch.randn(N, L, E)
    for mask in (nn.Transformer.generate_square_subsequent_mask(L), torch.ones(L, L).triu(1).bool()):
        for need_weights in (False, True):
            kwargs = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
            torch.testing.assert_close(ours(x, x, x, **kwargs)[0], stock(x, x, x, **kwargs)[0])
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        ours(x, x, x, is_causal=True)


def test_trainable_mask():
    ours, stock = pair(batch_first=True)
    x = torch.randn(N, L, E)
    grads = []
    for module in (ours, stock):
        mask = torch.linspace(-1, 1, L * L).view(L, L).requires_grad_()
        module(x, x, x, attn_mask=mask, need_weights=False)[0].square().sum().backward()
        grads.append(mask.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("need_weights", [False, True])
def test_fully_masked_rows_are_zero(need_weights):
    ours, _ = pair(batch_first=True)
    x = torch.randn(N, L, E)
    mask = torch.zeros(L, L, dtype=torch.bool)
    mask[2] = True
    out, weights = ours(x, x, x, attn_mask=mask, need_weights=need_weights)
    torch.testing.assert_close(out[:, 2], ours.out_proj.bias.expand(N, E))
    assert weights is None or weights[:, 2].eq(0).all()
    out.sum().backward()
    assert torch.isfinite(ours.in_proj_weight.grad).all()


def test_dropout_weights_are_those_that_were_used():
    ours, _ = pair(dropout=0.5, batch_first=True)
    nn.init.eye_(ours.out_proj.weight)
    x = torch.randn(N, L, E)
    out, weights = ours(x, x, x, average_attn_weights=False)
    assert (weights == 0).any() and (weights > 0).any()
    v = nn.functional.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    v = v.unflatten(-1, (H, E // H)).transpose(1, 2)
    torch.testing.assert_close(out, (weights @ v).transpose(1, 2).flatten(-2))
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


def test_out_proj_is_called_as_a_module():
    ours, _ = pair(batch_first=True)
    seen = []
    ours.out_proj.register_forward_hook(lambda module, args, result: seen.append(result.shape))
    x = torch.randn(N, L, E)
    ours(x, x, x)
    assert seen == [(N, L, E)]
    ours.out_proj = nn.Sequential(ours.out_proj, nn.Identity())
    ours(x, x, x)


def test_copies_compile_and_autocast():
    ours, stock = pair(batch_first=True)
    x = torch.randn(N, L, E)
    expected = stock(x, x, x, need_weights=False)[0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(twin(x, x, x)[0], expected)
    compiled = torch.compile(lambda x: ours(x, x, x, need_weights=False)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x, x, x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", [(0, S, N), (L, 0, N), (L, S, 0)], ids=str)
def test_empty(sizes):
    length, keys, batch = sizes
    ours, stock = pair(batch_first=True)
    q, k = torch.randn(batch, length, E), torch.randn(batch, keys, E)
    torch.testing.assert_close(ours(q, k, k, need_weights=False)[0], stock(q, k, k, need_weights=False)[0])


def errors():
    x = torch.randn(L, N, E)
    yield AssertionError, (x[None], x, x), {}
    yield AssertionError, (x, x[0], x), {}
    yield AssertionError, (x[..., :8], x, x), {}
    yield AssertionError, (x, x, x[:3]), {}
    yield AssertionError, (x, x, x), {"attn_mask": torch.zeros(L, L, dtype=torch.int32)}
    yield AssertionError, (x, x, x), {"key_padding_mask": torch.zeros(N, L + 1, dtype=torch.bool)}
    yield AssertionError, (x, x, x), {"key_padding_mask": torch.zeros(N, dtype=torch.bool)}
    yield RuntimeError, (x, x, x), {"attn_mask": torch.zeros(L, L + 1)}
    yield RuntimeError, (x, x, x), {"attn_mask": torch.zeros(N, L, L)}
    yield RuntimeError, (x, x, x), {"is_causal": True}


@pytest.mark.parametrize("error, tensors, options", list(errors()))
def test_errors_are_torchs(error, tensors, options):
    ours, stock = pair()
    with pytest.raises(error):
        stock(*tensors, **options)
    with pytest.raises(error):
        ours(*tensors, **options)


def test_constructor_errors_and_nested():
    with pytest.raises(AssertionError, match="divisible"):
        tx.MultiheadAttention(10, 3)
    with pytest.raises(ValueError, match="greater than 0"):
        tx.MultiheadAttention(0, 1)
    ours, _ = pair(batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with pytest.raises(TypeError, match="nested"):
        ours(nested, nested, nested)
