"""The loss of a linear layer's outputs without all of these: against exact numbers, torch's, and itself in parts."""

import subprocess
import sys

import pytest
import torch
from tolerances import DTYPES, assert_close, assert_gradient_close, farther, yardstick_dtype

import tformer_ext as tx
from tformer_ext import functional as F
from tformer_ext.ops import linear_cross_entropy as ops
from tformer_ext.ops import products

torchs = torch.nn.functional.cross_entropy
NAMES = ("loss", "x", "weight", "bias")


def problem(M=1100, K=40, N=2050, dtype=torch.float32, bias=True):
    """Rows for more than one part in every dtype, classes for more than two; some targets ignored."""
    x, weight = torch.randn(M, K), torch.randn(N, K) / K**0.5
    target = torch.randint(0, N, (M,))
    target[M // 3 : M // 2] = -100
    tensors = [x, weight, *([torch.randn(N)] if bias else [])]
    return [t.to(dtype) for t in tensors], target


def composed(x, linear_weight, target, linear_bias=None, ignore_index=None, **options):
    """What it stands for, in torch's operations."""
    logits = torch.nn.functional.linear(x, linear_weight, linear_bias)
    ignore_index = -100 if ignore_index is None else ignore_index
    return torchs(logits, target, ignore_index=ignore_index, **options)


def in_float32(x, weight, target, linear_bias=None, **options):
    """Likewise, with logits rounded to the dtype of x and the loss of them in float32, as transformers takes it."""
    logits = torch.nn.functional.linear(x, weight, linear_bias).float()
    return torchs(logits, target, **options).to(x.dtype)


def run(function, tensors, target, dtype=None, scale=1.0, **options):
    """[loss, gradients of x, weight and bias]"""
    x, weight, *bias = leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    loss = function(x, weight, target, linear_bias=bias[0] if bias else None, **options)
    grad = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape) if loss.dim() else torch.tensor(1.0)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, scale * grad.to(loss.dtype))]


@pytest.fixture(params=["onednn", "widened", "torch"])
def route(request, monkeypatch):
    """By all of the products, whatever this CPU would choose."""
    has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    onednn = {torch.float32, torch.bfloat16} if request.param == "onednn" and has_onednn else set()
    widened = {torch.bfloat16, torch.float16} if request.param == "widened" else set()
    monkeypatch.setattr(products, "onednn_dtypes", lambda: onednn)
    monkeypatch.setattr(products, "widened_dtypes", lambda: widened)


@pytest.fixture
def always(monkeypatch):
    """However few the logits are."""
    monkeypatch.setattr(ops, "_LEAST_LOGITS", 0)
    monkeypatch.setattr(ops, "_LEAST_CLASSES", 0)


@pytest.fixture
def taken(monkeypatch):
    """Fails where torch's operations are called instead of ours."""

    def refuse(*_, **__):
        raise AssertionError("the call went to torch")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", refuse)
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", refuse, raising=False)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("label_smoothing", "bias"), [(0.0, False), (0.2, True)])
def test_values_and_gradients(dtype, reduction, label_smoothing, bias, route):
    tensors, target = problem(dtype=dtype, bias=bias)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    golden = run(composed, tensors, target, torch.float64, **options)
    forms = [run(function, tensors, target, **options) for function in (composed, in_float32)]
    actual = run(F.linear_cross_entropy, tensors, target, **options)
    for name, a, g, *others in zip(NAMES, actual, golden, *forms, strict=False):
        assert a.dtype == dtype and a.is_contiguous()
        (assert_close if name == "loss" else assert_gradient_close)(a, g, farther(others, g), name)


def test_float64():
    tensors, target = problem(dtype=torch.float64)
    actual = run(F.linear_cross_entropy, tensors, target, label_smoothing=0.1)
    single = run(composed, tensors, target, torch.float32, label_smoothing=0.1)
    golden = run(composed, tensors, target, label_smoothing=0.1)
    for name, a, g, s in zip(NAMES, actual, golden, single, strict=True):
        assert s.dtype == yardstick_dtype(a.dtype)
        assert_close(a, g, s, name)


@pytest.mark.parametrize(("M", "N"), [(1, 70000), (64, 1024), (512, 1025), (513, 1024), (1025, 600), (2000, 513)])
def test_sizes(M, N, always, taken):
    for dtype in (torch.float32, torch.bfloat16):
        tensors, target = problem(M, 9, N, dtype)
        target[0] = N - 1
        golden = run(composed, tensors, target, torch.float64)
        same = run(composed, tensors, target)
        actual = run(F.linear_cross_entropy, tensors, target)
        for name, a, g, s in zip(NAMES, actual, golden, same, strict=True):
            (assert_close if name == "loss" else assert_gradient_close)(a, g, s, f"{name} {M} x {N} {dtype}")


def test_parts_do_not_show(monkeypatch):
    """Losses have the same bits in any parts of rows; sums of gradients are those of whole products."""
    tensors, target = problem()
    whole = run(F.linear_cross_entropy, tensors, target, reduction="none")
    golden = run(composed, tensors, target, torch.float64, reduction="none")
    monkeypatch.setattr(ops, "_ROW_BYTES", 4 * 37)
    actual = run(F.linear_cross_entropy, tensors, target, reduction="none")
    assert torch.equal(actual[0], whole[0])
    for name, a, g, w in zip(NAMES[1:], actual[1:], golden[1:], whole[1:], strict=True):
        assert_gradient_close(a, g, w, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_in_every_run_with_any_number_of_threads(dtype, threads):
    tensors, target = problem(dtype=dtype)
    losses = []
    for count in (1, 2, 5, 2):
        threads(count)
        first, second = (run(F.linear_cross_entropy, tensors, target) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        losses.append(first[0])
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_only_the_gradients_that_are_wanted(taken):
    tensors, target = problem()
    golden = run(F.linear_cross_entropy, tensors, target)
    for wanted in ((0,), (1,), (2,), (0, 2), (1, 2)):
        for reduction in ("mean", "sum"):
            leaves = [t.detach().requires_grad_(n in wanted) for n, t in enumerate(tensors)]
            loss = F.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction)
            loss = loss / (1 if reduction == "mean" else (target != -100).sum())
            loss.backward()
            for n, leaf in enumerate(leaves):
                assert (leaf.grad is not None) == (n in wanted)
                if n in wanted:
                    torch.testing.assert_close(leaf.grad, golden[1 + n])
    with torch.no_grad():
        leaves = [t.detach().requires_grad_() for t in tensors]
        assert torch.equal(F.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2]), golden[0])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_loss_that_is_scaled_and_differentiated_again(dtype):
    tensors, target = problem(dtype=dtype)
    leaves = [t.detach().requires_grad_() for t in tensors]
    loss = F.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2])
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, leaves)
    for a, b, c in zip(once, again, tripled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, 3 * a, rtol=torch.finfo(dtype).eps * 2, atol=3e-5)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_a_gradient_is_handed_over_without_a_copy():
    (x, weight), target = problem(bias=False)
    weight.requires_grad_()
    made = []
    stock = ops._run
    ops._run = lambda *operands: made.append(stock(*operands)) or made[-1]
    try:
        loss = F.linear_cross_entropy(x, weight, target)
    finally:
        ops._run = stock
    address = made.pop()[2].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == address


def test_float16_gradients_that_a_scaled_loss_keeps():
    """Of 1500 rows and 60000 classes most would be below what float16 holds, as they are with any GradScaler."""
    tensors, target = problem(1500, 8, 60000, torch.float16, bias=False)
    scale = 2.0**13
    golden = run(composed, tensors, target, torch.float64)
    actual = run(F.linear_cross_entropy, tensors, target, scale=scale)
    unscaled = run(F.linear_cross_entropy, tensors, target)
    for a, g, u in zip(actual[1:], golden[1:], unscaled[1:], strict=True):
        error = (a.double() / scale - g).norm() / g.norm()
        assert error < 2e-3 and error < (u.double() - g).norm() / g.norm()


def test_gradcheck(always, monkeypatch):
    monkeypatch.setattr(ops, "_ROW_BYTES", 16)
    monkeypatch.setattr(products, "_COLUMNS", 4)
    tensors, target = problem(7, 3, 11, torch.float64)
    for reduction in ("mean", "sum", "none"):

        def loss(x, weight, bias, how=reduction):
            return F.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=how, label_smoothing=0.1)

        leaves = [t.clone().requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)


def test_nothing_of_the_size_of_the_logits_is_kept():
    tensors, target = problem()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(F.linear_cross_entropy, tensors, target)
    most = max(t.numel() for t in tensors)
    assert kept and all(t.numel() <= most for t in kept)


def test_memory(tmp_path):
    """A training step on 4096 x 30000 logits, which are 490 MB each time they are whole, beside 30 MB of weights."""
    code = """
import resource, sys, torch
from tformer_ext import functional as F
x, weight = torch.randn(4096, 256).requires_grad_(), torch.randn(30000, 256).requires_grad_()
target = torch.randint(0, 30000, (4096,))
F.linear_cross_entropy(x[:600], weight, target[:600]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
F.linear_cross_entropy(x, weight, target).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1024 if sys.platform == "linux" else 1 << 20))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150


def test_of_nothing_that_counts(taken):
    tensors, target = problem()
    target[:] = -100
    loss, *grads = run(F.linear_cross_entropy, tensors, target)
    assert loss.isnan() and not any(g.any() for g in grads)
    loss, *grads = run(F.linear_cross_entropy, tensors, target, reduction="sum")
    assert loss == 0 and not any(g.any() for g in grads)
    tensors, target = problem()
    target[target == -100] = 7
    a = run(F.linear_cross_entropy, tensors, target, ignore_index=7)
    b = run(F.linear_cross_entropy, tensors, target.masked_fill(target == 7, -100))
    assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))


def test_strides():
    """Rows of x some elements apart, a weight that is part of a wider one, one that lies the other way, odd targets."""
    (x, weight, bias), target = problem()
    wide = torch.full((len(x), 60), torch.nan)
    wide[:, 5:45] = x
    wider = torch.full((len(weight), 44), torch.nan)
    wider[:, :40] = weight
    apart = torch.stack([target, target], 1)[:, 0]
    expected = run(F.linear_cross_entropy, [x, weight, bias], target)
    for weights in (wider[:, :40], weight.t().contiguous().t()):
        leaves = [wide[:, 5:45].detach().requires_grad_(), weights.detach().requires_grad_(), bias.requires_grad_()]
        loss = F.linear_cross_entropy(*leaves[:2], apart, linear_bias=leaves[2])
        actual = [loss.detach(), *torch.autograd.grad(loss, leaves)]
        torch.testing.assert_close(actual, expected)


def test_errors_are_torchs():
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch older than 2.13")
    (x, weight, bias), target = problem()
    for arguments, options, error in [
        ((x, weight, target + 3000), {}, IndexError),
        ((x, weight, target[:9]), {}, ValueError),
        ((x, weight[:, :9], target), {}, RuntimeError),
        ((x, weight.double(), target), {}, RuntimeError),
        ((x, weight, target.int()), {}, RuntimeError),
        ((x, weight, target), {"linear_bias": bias[:9]}, RuntimeError),
        ((x, weight, target), {"label_smoothing": 2.0}, RuntimeError),
        ((x, weight, target), {"label_smoothing": "some"}, TypeError),
        ((x, weight, target), {"reduction": "median"}, ValueError),
        ((x[None], weight, target), {}, RuntimeError),
        (("x", weight, target), {}, AttributeError),
        ((x, weight, "target"), {}, AttributeError),
    ]:
        messages = []
        for function in (F.linear_cross_entropy, torch.nn.functional.linear_cross_entropy):
            with pytest.raises(error) as caught:
                function(*arguments, **options)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_what_is_no_plain_call_goes_to_torch():
    (x, weight, _), target = problem()
    classes = torch.rand(len(weight), generator=torch.Generator().manual_seed(0))

    def loss(x, weight):
        return F.linear_cross_entropy(x, weight, target)

    for call, expected in [
        (F.linear_cross_entropy(x, weight, target, weight=classes), composed(x, weight, target, weight=classes)),
        (F.linear_cross_entropy(x[:3], weight[:50], target[:3] % 50), composed(x[:3], weight[:50], target[:3] % 50)),
        (F.linear_cross_entropy(x[0], weight, target[0]), composed(x[0], weight, target[0])),
        (F.linear_cross_entropy(x[:, :0], weight[:, :0], target), composed(x[:, :0], weight[:, :0], target)),
        (torch.func.grad(loss)(x, weight), torch.func.grad(lambda x, w: composed(x, w, target))(x, weight)),
        (torch.compile(loss, backend="aot_eager", fullgraph=True)(x, weight), composed(x, weight, target)),
        (torch.func.jvp(loss, (x, weight), (x, weight))[1],
         torch.func.jvp(lambda x, w: composed(x, w, target), (x, weight), (x, weight))[1]),
    ]:  # fmt: skip
        torch.testing.assert_close(call, expected)


def test_with_a_torch_that_has_none(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    (x, weight, bias), target = problem(30, 8, 60)
    target[target < 0] = 3
    actual = F.linear_cross_entropy(x, weight, target, linear_bias=bias, ignore_index=3, label_smoothing=0.1)
    expected = composed(x, weight, target, bias, 3, label_smoothing=0.1)
    torch.testing.assert_close(actual, expected)
    for operands, options in [((x, weight), {"options": "any"}), ((x, weight[:, None]), {})]:
        with pytest.raises(NotImplementedError, match="need torch 2"):
            F.linear_cross_entropy(*operands, target, **options)


def test_under_autocast(taken):
    tensors, target = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss, *grads = run(F.linear_cross_entropy, tensors, target)
    narrow = run(F.linear_cross_entropy, [t.bfloat16() for t in tensors], target)
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip([loss, *grads], narrow, strict=True))


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch older than 2.13")
def test_module():
    stock = torch.nn.LinearCrossEntropyLoss(40, 2050, bias=True, label_smoothing=0.1, ignore_index=3)
    model = torch.nn.ModuleDict({"loss": stock})
    (x, *_), target = problem()
    target[target < 0] = 3

    def train(loss):
        loss.zero_grad()
        result = loss(x, target)
        result.backward()
        return result.detach(), *(p.grad for p in loss.parameters())

    expected = train(stock)
    assert "LinearCrossEntropyLoss" in str(tx.replace_modules(model))
    assert type(model["loss"]) is tx.LinearCrossEntropyLoss
    torch.testing.assert_close(train(model["loss"]), expected)
    tx.restore_modules(model)
    assert type(stock) is torch.nn.LinearCrossEntropyLoss
    many = tx.LinearCrossEntropyLoss(40, 600, out_features=(2, 3), bias=True)
    wanted = torch.randint(0, 600, (len(x), 2, 3))
    torch.testing.assert_close(many(x, wanted), torch.nn.LinearCrossEntropyLoss.forward(many, x, wanted))
    own = tx.LinearCrossEntropyLoss(40, 2050, options=torch.nn.LinearCrossEntropyOptions())
    torch.testing.assert_close(own(x, target), torch.nn.LinearCrossEntropyLoss.forward(own, x, target))
