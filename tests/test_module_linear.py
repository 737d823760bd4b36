"""The modules' linear layers against torch's, where oneDNN and kernels of ours take over and where not."""

import contextlib
import time

import pytest
import torch
from tolerances import assert_close, assert_gradient_close, farther, finite_where_expected
from torch import nn

import tformer_ext as tx
from tformer_ext.modules import linear as ours
from tformer_ext.ops import products

F = nn.functional
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}
HALVES = (torch.bfloat16, torch.float16)
FEW_ROWS = torch.ops.tformer_ext._linear_few_rows
SHAPES = [((2, 3, 8), 5), ((130, 300), 400), ((1, 768), 768), ((3, 40, 1000), 530), ((0, 8), 5)]


@pytest.fixture(params=["onednn", "widened", "widened onednn", "torch"])
def route(request, monkeypatch):
    """All routes, whatever this CPU would choose."""
    onednn, widened = "onednn" in request.param, "widened" in request.param
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    choose(monkeypatch, {torch.float32, torch.bfloat16} if onednn else set(), set(HALVES) if widened else set())


def choose(monkeypatch, onednn, widened):
    monkeypatch.setattr(products, "onednn_dtypes", lambda: onednn)
    monkeypatch.setattr(products, "widened_dtypes", lambda: widened)


def running_sums(activation, grad, x, w, b=None):
    """Result and gradients with each sum taken along the whole row, as oneDNN does; torch adds in pieces."""

    def product(x, w):
        total = torch.zeros(len(x), len(w))
        for k in range(x.shape[1]):
            total = torch.addcmul(total, x[:, k : k + 1], w[:, k])
        return total

    rows = x.reshape(-1, x.shape[-1])
    before = product(rows, w).add(0 if b is None else b).requires_grad_()
    y = activation(before)
    (g,) = torch.autograd.grad(y, before, grad.reshape(y.shape))
    y, grad_x = y.detach().view(grad.shape), product(g, w.t()).view(x.shape)
    return y, grad_x, product(g.t(), rows.t()), *([] if b is None else [g.sum(0)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("shape", "out"), SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, out, dtype, activation, bias, route):
    tensors = [torch.randn(shape), torch.randn(out, shape[-1]) / shape[-1] ** 0.5, torch.randn(out)][: 2 + bias]
    tensors = [t.to(dtype) for t in tensors]
    grad = torch.randn(*shape[:-1], out).to(dtype)

    def run(function, kind):
        x, w, *b = leaves = [t.detach().to(kind).requires_grad_() for t in tensors]
        y = function(x, w, b[0] if b else None)
        return y.detach(), *torch.autograd.grad(y, leaves, grad.to(kind))

    def stock(x, w, b):
        return ACTIVATIONS[activation](F.linear(x, w, b))

    actual = run(lambda x, w, b: ours.linear(x, w, b, activation), dtype)
    golden, yardstick = run(stock, torch.float64), run(stock, dtype)
    if dtype == torch.float32:
        other = running_sums(ACTIVATIONS[activation], grad, *tensors)
        yardstick = [farther(forms, g) for *forms, g in zip(yardstick, other, golden, strict=True)]
    if actual[0].numel() == 0:
        assert all(torch.equal(a, y) for a, y in zip(actual, yardstick, strict=True))
        return
    # where a sum rounds to the other side of 0, the gradient of ReLU is another; elsewhere it is the same maths
    checks = zip(actual, golden, yardstick, ("y", "x", "weight", "bias"), strict=False)
    for a, g, y, name in checks:
        if name != "y" and activation == "relu":
            assert (a.double() - g).norm() <= 2 * (y.double() - g).norm() + 1e-2 * g.norm(), name
        elif name == "y":
            assert_close(a, g, y, name)
        else:
            assert_gradient_close(a, g, y, name)
    with torch.no_grad():
        x, w, *b = tensors
        assert_close(ours.linear(x, w, b[0] if b else None, activation), golden[0], yardstick[0], "without grad")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("out", [530, 2048])
@pytest.mark.parametrize("bias", [True, False])
def test_large_results(out, dtype, activation, bias, route, monkeypatch):
    """Made in parts, as those of a vocabulary are; the rows of 2048 are a page apart."""
    parts, stock = [], products.large_parts
    monkeypatch.setattr(products, "large_parts", lambda columns: parts.append(columns) or stock(columns))
    monkeypatch.setattr(products, "_LARGE_BYTES", 1 << 16)
    monkeypatch.setattr(products, "_COLUMNS", 100)
    test_linear((3, 40, 300), out, dtype, activation, bias, route)
    multiplied = products.onednn_dtypes() - products.widened_dtypes()
    if dtype in multiplied:  # y, the gradients of x and weight, y without gradients
        assert parts == [out] * (4 if out == 530 else 3)


def test_large_results_under_autocast(monkeypatch):
    """They are not torch's, and are those of operands that were cast before."""
    choose(monkeypatch, {torch.bfloat16} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else set(), set())
    monkeypatch.setattr(products, "_LARGE_BYTES", 1 << 16)
    tensors = torch.randn(120, 300), torch.randn(530, 300), torch.randn(530)

    def run(cast, context):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with context:
            y = ours.linear(*(cast(t) for t in leaves))
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    actual = run(lambda t: t, torch.autocast("cpu", torch.bfloat16))
    expected = run(torch.Tensor.bfloat16, contextlib.nullcontext())
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    if products.onednn_dtypes():
        assert actual[0].grad_fn.name() == expected[0].grad_fn.name() == "ViewBackward0"


def test_backward_of_large_results_within_autocast(monkeypatch):
    choose(monkeypatch, {torch.bfloat16} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else set(), set())
    monkeypatch.setattr(products, "_LARGE_BYTES", 1 << 16)
    x, w = torch.randn(120, 300).bfloat16().requires_grad_(), torch.randn(530, 300).bfloat16().requires_grad_()
    y = ours.linear(x, w, None)
    expected = torch.autograd.grad(y, (x, w), torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", torch.float16):
        actual = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_large_results_lie_in_memory_that_is_kept():
    if torch.float32 not in products.onednn_dtypes():
        pytest.skip("torch's products are taken here")
    tx.memory.release()
    with torch.no_grad():
        y = ours.linear(torch.randn(300, 64), torch.randn(40000, 64), None)
    size = y.nbytes
    del y
    assert size > 32 << 20 and tx.memory.kept_bytes() >= size
    tx.memory.release()
    with pytest.raises(RuntimeError, match="rows, columns: expected 0 or more"):
        products.empty_matrix(torch.ones(1), 3, -1, torch.float32)


def test_rows_need_not_be_contiguous(route):
    x, w, grad = torch.randn(400, 130).t(), torch.randn(300, 400), torch.randn(300, 130).t()
    a, b = (t.clone().requires_grad_() for t in (x, x))
    torch.testing.assert_close(ours.linear(x, w, None), F.linear(x, w), rtol=1e-4, atol=1e-4)
    ours.linear(a, w, None).backward(grad)
    F.linear(b, w).backward(grad)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows, features, out", [(5000, 40, 530), (300, 400, 130), (130, 400, 300)])
@pytest.mark.parametrize("layout", ["rows", "transposed", "part of rows", "every other column"])
def test_gradients_of_weights_in_any_layout(rows, features, out, layout, route):
    wide, tall = torch.randn(out, 2 * features) / features**0.5, torch.randn(features, out) / features**0.5
    w = {"rows": wide[:, :features].clone(), "transposed": tall.t(), "part of rows": wide[:, :features]}.get(
        layout, wide[:, ::2]
    )
    x, grad = torch.randn(rows, 2 * features)[:, :features], torch.randn(rows, out)

    def run(function, dtype):
        # the same strides in each dtype; leaves of their own, to which to() would not be a view
        leaves = [torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t).requires_grad_() for t in (x, w)]
        y = function(*leaves, None)
        return y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))

    actual, golden, torchs = run(ours.linear, torch.float32), run(F.linear, torch.float64), run(F.linear, torch.float32)
    other = running_sums(lambda y: y, grad, x, w)
    for name, a, g, *yardsticks in zip(("y", "x", "weight"), actual, golden, torchs, other, strict=True):
        assert_gradient_close(a, g, farther(yardsticks, g), name)
    if layout in ("rows", "transposed"):  # so that it is kept as it is where gradients are accumulated
        assert actual[2].stride() == w.stride()


def test_a_weight_that_is_part_of_another_costs_a_copy_only():
    """oneDNN multiplies by strides that it does not know several hundred times as slowly."""
    x, w = torch.randn(128, 768), torch.randn(768, 2304)[:, :768]

    def seconds(weight):
        def once():
            start = time.perf_counter()
            products.product(x, weight, None)
            return time.perf_counter() - start

        return min(once() for _ in range(5))

    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    assert seconds(w) < 50 * seconds(w.contiguous())


def test_operands_are_widened_in_pieces(monkeypatch):
    choose(monkeypatch, set(), {torch.bfloat16})
    x, w, b = (t.bfloat16() for t in (torch.randn(3, 50, 300), torch.randn(301, 300), torch.randn(301)))
    whole, sizes = ours.linear(x, w, b), []

    def product(x, w, b):
        sizes.append((len(x), len(w)))
        return stock(x, w, b)

    stock = F.linear
    monkeypatch.setattr(F, "linear", product)
    monkeypatch.setattr(products, "_MOST_WIDENED", 30000)
    torch.testing.assert_close(ours.linear(x, w, b), whole, rtol=0.01, atol=1e-3)
    assert sizes == [(rows, columns) for rows in (100, 50) for columns in (100, 100, 100, 1)]


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_to_what_is_widened(activation, rows, monkeypatch):
    choose(monkeypatch, set(), {torch.bfloat16})
    tensors = torch.randn(rows, 300), torch.randn(301, 300) / 300**0.5, torch.randn(301)

    def run(function, kind, inside):
        leaves = [t.to(kind).requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            y = function(*leaves)
            return y, *torch.autograd.grad(y.float().pow(2).sum() if inside else y.pow(2).sum(), leaves)

    def stock(x, w, b):
        return ACTIVATIONS[activation](F.linear(x, w, b))

    actual = run(lambda *leaves: ours.linear(*leaves, activation), torch.float32, True)
    golden, yardstick = run(stock, torch.float64, False), run(stock, torch.float32, True)
    assert [a.dtype for a in actual] == [torch.bfloat16] + [torch.float32] * 3
    for a, g, y in zip(actual, golden, yardstick, strict=True):  # ReLU: see test_linear
        assert (a.double() - g).norm() <= 2 * (y.double() - g).norm() + 1e-3 * g.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours._casts_for_autocast(*tensors) == (rows == 64)  # torch keeps a weight's cast for the next row
        assert not ours._casts_for_autocast(tensors[0].double(), *tensors[1:])
    with torch.autocast("cpu", torch.float16):
        assert not ours._casts_for_autocast(*tensors)
    assert not ours._casts_for_autocast(*tensors)


def lying_along(dim, weight):
    """The same numbers, in rows (as nn.Linear has them) or columns that lie one behind the other and a bit apart."""
    apart = torch.full((weight.shape[dim], weight.shape[1 - dim] + 3), torch.nan, dtype=weight.dtype)
    apart[:, : weight.shape[1 - dim]] = weight if dim == 0 else weight.t()
    apart = apart[:, : weight.shape[1 - dim]]
    return apart if dim == 0 else apart.t()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_few_rows(isa, dtype, along, bias):
    """Fewer than a vector, more columns than a task has, more sums than fit in L1, several parts, odd everywhere."""
    for M, K, N in [
        (1, 1, 1),
        (1, 5, 3),
        (2, 64, 64),
        (3, 33, 17),
        (4, 770, 63),
        (5, 99, 2100),
        (8, 100, 4500),
        (64, 41, 150),
        (2, 1031, 1500),
    ]:
        tensors = [torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N)][: 2 + bias]
        x, w, *b = tensors = [t.to(dtype) for t in tensors]
        golden, yardstick = F.linear(*(t.double() for t in tensors)), F.linear(*tensors)
        if dtype == torch.float32:
            yardstick = farther((yardstick, running_sums(ACTIVATIONS["none"], yardstick, *tensors)[0]), golden)
        w = lying_along(along, w)
        assert_close(FEW_ROWS(x, w, b[0] if b else None), golden, yardstick, f"{M} x {K} -> {N}")


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_few_rows_and_numbers_that_are_none(isa, dtype, along):
    x, w, b = torch.randn(3, 130).to(dtype), torch.randn(200, 130).to(dtype), torch.randn(200).to(dtype)
    x[1, 129], w[77, 0], w[199, 128], b[5] = torch.inf, torch.nan, -torch.inf, torch.inf
    expected = F.linear(x, w, b)
    finite_where_expected(FEW_ROWS(x, lying_along(along, w), b), expected, "y")


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_few_rows_on_any_number_of_threads(dtype, along, threads):
    x, w, b = torch.randn(3, 1030).to(dtype), torch.randn(1501, 1030).to(dtype), torch.randn(1501).to(dtype)
    w = lying_along(along, w)
    results = []
    for count in (1, 2, 5, 2):
        threads(count)
        results.append(FEW_ROWS(x, w, b))
    assert all(torch.equal(results[0], y) for y in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_which_calls_have_few_rows(dtype, monkeypatch):
    choose(monkeypatch, set(), {torch.float16})
    seen = []

    def counted(x, weight, bias):
        seen.append(len(x.view(-1, 700)))
        return FEW_ROWS(x, weight, bias)

    monkeypatch.setattr(ours, "linear_few_rows", counted)
    module, conv = ours.Linear(700, 600, dtype=dtype), torch.randn(700, 600, dtype=dtype)
    x = torch.randn(2, 20, 700, dtype=dtype)
    with torch.no_grad():
        for rows in (x[:1, :1], x[:, -1:], x[:1, :8], x[:1, :9], x[:1, :15], x[:1, :16], x[:, :0], x):
            for w, b in ((module.weight, module.bias), (conv.t(), None)):
                y = module(rows) if b is not None else ours.linear(rows, w, b)
                torch.testing.assert_close(y, F.linear(rows, w, b), rtol=0.02, atol=0.01)
    most = [1, 2, 8, 9, 15] if dtype == torch.float16 else [1, 2, 8]
    assert seen == [n for n in most for _ in range(2)]
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        module(x[:1, :1])
    assert module(x[:1, :1]).requires_grad
    with torch.no_grad():
        ours.linear(x[:1, :1].double(), module.weight.double(), None)
        ours.linear(x[:1, :1], torch.randn(600, 1400, dtype=dtype)[:, ::2], None)
        ours.linear(x[:1, :1], module.weight, module.bias[::600].clone())  # broadcasts
    assert not seen


def test_few_rows_of_what_does_not_fit():
    x, w, b = torch.randn(2, 30), torch.randn(40, 30), torch.randn(40)
    for operands, message in [
        ((x, w[:, :20], b), "weight: expected"),
        ((x, w.double(), b), "weight: expected the dtype"),
        ((x, torch.randn(40, 60)[:, ::2], b), "weight: expected a stride of 1"),
        ((x, w, b[:9]), "bias: expected"),
        ((x.double(), w.double(), None), "x: expected float32"),
        ((torch.randn(65, 30), w, b), "x: expected 1 to 64 rows"),
        ((x[:, :0], w[:, :0], b), "of at least one element"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            FEW_ROWS(*operands)
    assert FEW_ROWS(x[:0], w, b).shape == (0, 40)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_module(dtype, route):
    torch.manual_seed(1)
    stock = nn.Linear(256, 300, dtype=dtype)
    torch.manual_seed(1)
    module = ours.Linear(256, 300, dtype=dtype)
    assert isinstance(module, nn.Linear) and repr(module) == repr(stock) and ours.is_plain_linear(module)
    module.load_state_dict(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), stock.parameters(), strict=True))
    x = torch.randn(5, 20, 256, dtype=dtype)
    torch.testing.assert_close(module(x), stock(x))
    with pytest.raises(RuntimeError):  # torch's own
        module(x[..., :100])
    module.register_forward_hook(lambda *_: None)
    assert not ours.is_plain_linear(module)


def test_results_may_be_modified_in_place(route):
    x, w = torch.randn(2, 70, 256, requires_grad=True), torch.randn(256, 256)
    y = ours.linear(x, w, None)
    y += 1
    y.sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_only_some_gradients_and_gradients_of_gradients(dtype, tolerance, route):
    x, w = torch.randn(200, 256, dtype=dtype), torch.randn(256, 256, dtype=dtype, requires_grad=True)
    y = ours.linear(x, w, None, "relu").square().sum()
    (g,) = torch.autograd.grad(y, w, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), w)
    z = F.relu(F.linear(x, w)).square().sum()
    (h,) = torch.autograd.grad(z, w, create_graph=True)
    (expected,) = torch.autograd.grad(h.square().sum(), w)
    assert (g - h).norm() <= tolerance * h.norm() and (second - expected).norm() <= tolerance * expected.norm()


def test_what_is_no_plain_call_goes_to_torch(monkeypatch):
    """Under autocast, tracing, transforms and for subclasses only torch knows what to do."""
    choose(monkeypatch, {torch.float32, torch.bfloat16}, {torch.float16})

    class Tagged(torch.Tensor):
        pass

    x, w = torch.randn(256, 256), torch.randn(256, 256)
    assert ours._is_taken(x, w, None) == torch._C._get_mkldnn_enabled()
    assert type(ours.linear(x.as_subclass(Tagged), w, None)) is Tagged
    assert not ours._is_taken(x, w.as_subclass(Tagged), None)
    assert not ours._is_taken(x, w.double(), None) and not ours._is_taken(x, w[:, :9], None)
    assert not ours._is_taken(x[:2, :8], w[:, :8], None)
    assert ours._is_taken(x.half(), w.half(), None) and not ours._is_taken(x[:15].half(), w.half(), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.linear(x, w, None).dtype == torch.bfloat16
        assert not ours._is_taken(x.half(), w.half(), None)
    traced = torch.jit.trace(ours.Linear(256, 256).half(), x.half(), check_trace=False)
    assert [node.kind() for node in traced.graph.nodes()][-1] == "aten::linear" and len(traced(x[:99].half())) == 99
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        y = torch.autograd.forward_ad.unpack_dual(ours.linear(dual, w, None))
        assert torch.equal(y.tangent, y.primal)
    assert "product" not in str(torch.fx.symbolic_trace(ours.Linear(256, 256)).graph)
    mapped = torch.func.vmap(lambda t: ours.linear(t, w, None))(x.view(2, 128, 256))
    torch.testing.assert_close(mapped.view(256, 256), F.linear(x, w))
