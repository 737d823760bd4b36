"""Cross entropy against exact numbers and torch's: every ISA and dtype, odd sizes, infinities, what goes to torch."""

import numpy as np
import pytest
import torch
from tolerances import DTYPES, assert_close, assert_gradient_close, farther, finite_where_expected, yardstick_dtype
from torch.library import opcheck

import tformer_ext as tx
from tformer_ext import functional as F
from tformer_ext import reference
from tformer_ext.ops import cross_entropy as ops

FORWARD = torch.ops.tformer_ext._cross_entropy_forward.default
BACKWARD = torch.ops.tformer_ext._cross_entropy_backward.default
IN_PLACE = torch.ops.tformer_ext._cross_entropy_backward_.default
torchs = torch.nn.functional.cross_entropy


def problem(M, N, dtype=torch.float32, apart=3):
    """Logits whose rows lie some elements apart, with NaN between them; targets, one of which is ignored; gradients."""
    wide = torch.full((M, N + apart), torch.nan, dtype=dtype)
    wide[:, :N] = torch.randn(M, N) * 3
    target = torch.randint(0, N, (M,))
    target[M // 2] = -100
    return wide[:, :N], target, torch.randn(M)


def both(input, target, grad, label_smoothing=0.0):
    """Losses and gradient by the operators."""
    loss, *statistics = FORWARD(input, target, -100, label_smoothing)
    return loss, BACKWARD(grad.to(loss.dtype), input, target, *statistics, -100, label_smoothing)


def by_formula(input, target, grad, dtype, label_smoothing=0.0):
    """Likewise in torch's operations."""
    rows, ignored = input.to(dtype), (target == -100).unsqueeze(1)
    asked = torch.full_like(rows, label_smoothing / rows.shape[1])
    asked.scatter_add_(1, target.clamp(min=0).unsqueeze(1), torch.full_like(rows, 1 - label_smoothing))
    loss = reference.cross_entropy(rows, target, label_smoothing=label_smoothing)
    return loss, ((rows.softmax(1) - asked) * grad.to(dtype).unsqueeze(1)).masked_fill(ignored, 0)


def exactly(input, target, grad, label_smoothing=0.0):
    """Likewise, in numpy's longest type: what is golden for float64 has to be closer than float64 is."""
    kind, rows = np.longdouble, np.arange(len(target))
    x, classes, s = input.double().numpy().astype(kind), target.clamp(min=0).numpy(), kind(label_smoothing)
    centered = x - x.max(1, keepdims=True)
    log_p = centered - np.log(np.exp(centered).sum(1, keepdims=True))
    asked = np.full_like(x, s / x.shape[1])
    asked[rows, classes] += 1 - s
    loss = -(1 - s) * log_p[rows, classes] - s * log_p.mean(1)
    grad_input = (np.exp(log_p) - asked) * grad.double().numpy().astype(kind)[:, None]
    counts = target.numpy() != -100
    return [torch.from_numpy((t.T * counts).T.astype(np.float64)) for t in (loss, grad_input)]


def by_autograd(input, target, grad, label_smoothing):
    """torch's own, in float32."""
    rows = input.detach().float().requires_grad_()
    loss = torchs(rows, target, label_smoothing=label_smoothing, reduction="none")
    return loss.detach(), torch.autograd.grad(loss, rows, grad)[0]


@pytest.fixture
def always(monkeypatch):
    """However few the logits are."""
    monkeypatch.setattr(ops, "_LEAST_LOGITS", 0)
    monkeypatch.setattr(ops, "_LEAST_CLASSES", 0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(isa, dtype, label_smoothing):
    for M, N in [(1, 1), (1, 2), (40, 5), (40, 31), (40, 64), (30, 1000), (30, 1024), (30, 1025), (20, 5003)]:
        input, target, grad = problem(M, N, dtype)
        loss, grad_input = both(input, target, grad, label_smoothing)
        golden = exactly(input, target, grad, label_smoothing)
        wide = torch.float32 if dtype != torch.float64 else yardstick_dtype(dtype)
        rounded = by_formula(input, target, grad, wide, label_smoothing)
        other = by_autograd(input, target, grad, label_smoothing)
        forms = [g.to(yardstick_dtype(dtype)) for g in (rounded[1], other[1])]
        name = f"{M} x {N}"
        assert_close(loss, golden[0], farther((rounded[0], other[0]), golden[0]), name)
        assert_gradient_close(grad_input, golden[1], farther(forms, golden[1]), name)
        assert grad_input.is_contiguous() and not grad_input[M // 2].any() and loss[M // 2] == 0


@pytest.mark.parametrize("N", [50257, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_gradients_have_the_bits_of_small_ones(isa, dtype, N):
    """They are written past the caches, in whole lines, from wherever a row begins; rows may be shorter than a line."""
    M = (60 << 20) // (N * dtype.itemsize)
    input, target, grad = problem(M, N, dtype)
    loss, grad_input = both(input, target, grad, 0.1)
    parts = [both(*part, 0.1) for part in zip(*(t.chunk(8) for t in (input, target, grad)), strict=True)]
    few = [torch.cat(part) for part in zip(*parts, strict=True)]
    assert torch.equal(loss, few[0]) and torch.equal(grad_input, few[1])


@pytest.mark.parametrize("N", [5, 1000, 5003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_in_the_place_of_logits_have_the_same_bits(isa, dtype, N):
    input, target, grad = problem(40, N, dtype)
    loss, expected = both(input, target, grad, 0.1)
    _, *statistics = FORWARD(input, target, -100, 0.1)
    IN_PLACE(grad.to(loss.dtype), input, target, *statistics, -100, 0.1)
    assert torch.equal(input, expected)
    between = input.as_strided((40, 3), (N + 3, 1), N)
    assert between.isnan().all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_none(isa, dtype, label_smoothing):
    inf = torch.inf
    input, target, grad = problem(8, 3000, dtype)
    target[:] = 2500
    input[0, 17], input[1, 2999], input[2, 2500], input[3, 4] = torch.nan, inf, inf, -inf
    input[4, :2400] = -inf  # whole blocks of classes that are impossible
    input[5], input[6, 2500], input[7, 3] = -inf, -inf, torch.nan
    target[7] = -100
    golden = by_formula(input, target, grad, torch.float64, label_smoothing)
    for actual, expected, name in zip(both(input, target, grad, label_smoothing), golden, ("loss", "x"), strict=True):
        if name == "x":  # an ignored row has no gradient, whatever it holds
            assert not actual[7].any()
            actual, expected = actual[:7], expected[:7]
        finite_where_expected(actual, expected, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(isa, dtype):
    """No power overflows, and a row that is sure of its class has no loss."""
    input = torch.zeros(3, 2000, dtype=dtype)
    input[0, 1999], input[1, 0], input[2] = 3e4, -3e4, 3e4
    target = torch.tensor([1999, 0, 5])
    loss, grad = both(input, target, torch.ones(3))
    golden = by_formula(input, target, torch.ones(3), torch.float64)
    rounded = by_formula(input, target, torch.ones(3), torch.float32)
    assert_close(loss, golden[0], rounded[0])
    assert loss[0] == 0 and not grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads(dtype, threads):
    input, target, grad = problem(70, 5003, dtype)
    results = []
    for count in (1, 2, 5, 2):
        threads(count)
        results.append(both(input, target, grad, 0.1))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_as_torchs_function_and_module(dtype, label_smoothing, reduction):
    input, target, _ = problem(80, 1000, dtype)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": 7}
    target = target.clamp(min=7)

    def run(function, kind):
        x = input.detach().to(kind).requires_grad_()
        loss = function(x, target)
        return loss.detach(), *torch.autograd.grad(loss.sum(), x)

    functions = [lambda x, t: F.cross_entropy(x, t, **options), tx.CrossEntropyLoss(**options)]
    share = torch.ones(80).double() / ((target != 7).sum() if reduction == "mean" else 1)
    losses, of_x = exactly(input, target.masked_fill(target == 7, -100), share, label_smoothing)
    golden = losses if reduction == "none" else (losses * share).sum()
    wide = run(lambda x, t: torchs(x, t, **options), torch.float32)
    yardstick = [t.to(yardstick_dtype(dtype)) for t in wide]
    for function in functions:
        actual = run(function, dtype)
        assert actual[0].dtype == actual[1].dtype == dtype
        assert_close(actual[0], golden, yardstick[0], "loss")
        assert_gradient_close(actual[1], of_x, yardstick[1], "x")
    assert ops.plain_cross_entropy(input, target, 7, reduction, label_smoothing) is not None
    with torch.no_grad():
        loss = functions[0](input, target)
    assert torch.equal(loss, run(functions[0], dtype)[0])


def test_of_nothing_that_counts():
    input, target = torch.randn(100, 1000), torch.full((100,), -100)
    assert F.cross_entropy(input, target).isnan() and F.cross_entropy(input, target, reduction="sum") == 0


def test_gradcheck(always):
    input, target, _ = problem(4, 6, torch.float64)
    input = input.clone().requires_grad_()
    for reduction in ("mean", "none"):

        def loss(x, how=reduction):
            return F.cross_entropy(x, target, reduction=how, label_smoothing=0.1)

        assert torch.autograd.gradcheck(loss, input) and torch.autograd.gradgradcheck(loss, input)


def test_what_is_kept_for_backward():
    """Logits, targets, and a number for each row: nothing else of their size."""
    input, target, _ = problem(128, 2000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.cross_entropy(input.requires_grad_(), target)
    assert [t.shape for t in kept if t.numel() > 128] == [input.shape]
    assert any(t.data_ptr() == input.data_ptr() for t in kept)


def test_opcheck():
    input, target, grad = problem(5, 70)
    opcheck(FORWARD, (input, target, -100, 0.1))
    _, *statistics = FORWARD(input, target, -100, 0.1)
    opcheck(BACKWARD, (grad, input, target, *statistics, -100, 0.1))
    opcheck(IN_PLACE, (grad, input.contiguous(), target, *statistics, -100, 0.1))


def test_bad_operands_of_the_operators():
    input, target, grad = problem(5, 70)
    _, highest, total = FORWARD(input, target, -100, 0.0)
    for operands, message in [
        ((input, target.int(), -100, 0.0), "target: expected a contiguous int64"),
        ((input, target[:4], -100, 0.0), "target: expected a contiguous int64"),
        ((input, target + 70, -100, 0.0), "target: expected 0 to 69"),
        ((input, target, -1, 0.0), "target: expected 0 to 69 or -1, got -100"),
        ((input, target, -100, 1.5), "label_smoothing"),
        ((input.int(), target, -100, 0.0), "input: expected"),
        ((input.t(), target[:1].expand(70).contiguous(), -100, 0.0), "input: expected a last stride of 1"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            FORWARD(*operands)
    whole = grad, highest, total
    for place, wrong in [(0, grad.double()), (0, grad[:1].expand(5)), (1, highest[:4]), (2, total[:4])]:
        operands = [*whole[:place], wrong, *whole[place + 1 :]]
        with pytest.raises(RuntimeError, match="expected a contiguous tensor of an element for each row"):
            BACKWARD(operands[0], input, target, *operands[1:], -100, 0.0)


def test_errors_are_torchs():
    input, target, _ = problem(100, 1000)
    for arguments, options, error in [
        ((input, target + 1000), {}, IndexError),
        ((input, target[:9]), {}, ValueError),
        ((input, target.int()), {}, RuntimeError),
        ((input, target), {"label_smoothing": 2.0}, RuntimeError),
        ((input, target), {"label_smoothing": "some"}, TypeError),
        ((input, target), {"reduction": "median"}, ValueError),
        ((input, "target"), {}, TypeError),
    ]:
        messages = []
        for function in (F.cross_entropy, torchs):
            with pytest.raises(error) as caught:
                function(*arguments, **options)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_what_is_no_plain_call_goes_to_torch(monkeypatch):
    class Tagged(torch.Tensor):
        pass

    input, target, _ = problem(100, 1000)

    def taken(*operands):
        return ops.plain_cross_entropy(*operands, -100, "mean") is not None

    assert taken(input, target)
    assert not taken(input[:50], target[:50]) and not taken(input[:, :500], target) and not taken(input[0], target[0])
    assert not taken(input.as_subclass(Tagged), target) and not taken(input.t().contiguous().t(), target)
    assert not taken(input, torch.rand_like(input)) and not taken(input.to("meta"), target.to("meta"))
    calls = [
        lambda x, t: F.cross_entropy(x, t, weight=torch.rand(1000, generator=torch.Generator().manual_seed(0))),
        lambda x, t: F.cross_entropy(x.view(10, 10, 1000).transpose(1, 2), t.view(10, 10)),
        lambda x, t: F.cross_entropy(x, x.softmax(1)),
        lambda x, t: F.cross_entropy(x[:3], t[:3]),
        lambda x, t: torch.func.vmap(F.cross_entropy)(x.view(2, 50, 1000), t.clamp(min=0).view(2, 50)),
        lambda x, t: torch.func.grad(F.cross_entropy)(x, t),
        lambda x, t: torch.compile(F.cross_entropy, backend="aot_eager", fullgraph=True)(x, t),
    ]
    actual = [call(input, target) for call in calls]
    monkeypatch.setattr(F, "cross_entropy", torchs)
    torch.testing.assert_close(actual, [call(input, target) for call in calls])


def test_under_autocast():
    input, target, _ = problem(100, 1000)
    for dtype in (torch.float32, torch.bfloat16):
        x = input.to(dtype).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss, expected = F.cross_entropy(x, target), torchs(x, target)
        assert loss.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(loss, expected)
        (actual,), (expected,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, x)
        torch.testing.assert_close(actual, expected)
