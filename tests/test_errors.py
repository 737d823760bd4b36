"""Every bad argument: the exception's type, and that its message names the argument."""

import pytest
import torch

import tformer_ext as tx
from tformer_ext import functional as F

Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
X = torch.randn(3, 6)


def attention(query=Q, key=K, value=V, **options):
    return F.attention(query, key, value, **options)


BAD_ATTENTION = [
    ("query", TypeError, {"query": [1]}),
    ("key", TypeError, {"key": None}),
    ("query", ValueError, {"query": Q[0]}),
    ("value", ValueError, {"value": V[0, 0]}),
    ("query", TypeError, {"query": Q.long()}),
    ("query", TypeError, {"query": Q.to(torch.complex64)}),
    ("key", TypeError, {"key": K.double()}),
    ("value", TypeError, {"value": V.half()}),
    ("key", ValueError, {"key": K[:1], "value": V[:1]}),
    ("key", ValueError, {"key": K[..., :4]}),
    ("value", ValueError, {"value": V[:, :, :3]}),
    ("value", ValueError, {"value": V[:, :1]}),
    ("query", ValueError, {"query": Q[:, :3]}),
    ("query", ValueError, {"query": Q[..., :0], "key": K[..., :0]}),
    ("bias", TypeError, {"bias": torch.zeros(5, 7, dtype=torch.int64)}),
    ("bias", TypeError, {"bias": torch.zeros(5, 7, dtype=torch.bool)}),
    ("bias", TypeError, {"bias": 1.0}),
    ("bias", ValueError, {"bias": torch.zeros(5, 6)}),
    ("bias", ValueError, {"bias": torch.zeros(1, 1, 1, 5, 7)}),
    ("mask", TypeError, {"mask": torch.zeros(5, 7)}),
    ("mask", ValueError, {"mask": torch.ones(3, 1, 5, 7, dtype=torch.bool)}),
    ("mask", ValueError, {"mask": torch.ones(5, 7, dtype=torch.bool, device="meta")}),
    ("bias", ValueError, {"bias": torch.zeros(5, 7, device="meta")}),
    ("mask", TypeError, {"mask": torch.ones(5, 7, dtype=torch.bool).to_sparse()}),
    ("bias", TypeError, {"bias": torch.zeros(5, 7).to_sparse()}),
    ("query", TypeError, {"query": Q.to_sparse()}),
    ("causal", ValueError, {"causal": "lower"}),
    ("causal", ValueError, {"causal": []}),
    ("window", ValueError, {"window": 3}),
    ("window", ValueError, {"window": (3,)}),
    ("window", ValueError, {"window": (-2, 0)}),
    ("window", TypeError, {"window": (1.5, 0)}),
    ("alibi_slopes", ValueError, {"alibi_slopes": torch.ones(3)}),
    ("alibi_slopes", TypeError, {"alibi_slopes": torch.ones(4, dtype=torch.int32)}),
    ("alibi_slopes", ValueError, {"alibi_slopes": torch.ones(4, requires_grad=True)}),
    ("sinks", ValueError, {"sinks": torch.ones(2)}),
    ("sinks", TypeError, {"sinks": torch.ones(4, dtype=torch.bool)}),
    ("key_lengths", TypeError, {"key_lengths": torch.ones(2)}),
    ("key_lengths", TypeError, {"key_lengths": [7, 7]}),
    ("key_lengths", ValueError, {"key_lengths": torch.tensor([7])}),
    ("key_lengths", ValueError, {"key_lengths": torch.tensor([8, 7])}),
    ("key_lengths", ValueError, {"key_lengths": torch.tensor([-1, 7])}),
    ("scale", TypeError, {"scale": "1"}),
    ("softcap", ValueError, {"softcap": -1.0}),
    ("softcap", TypeError, {"softcap": True}),
    ("dropout_p", ValueError, {"dropout_p": 1.5}),
    ("dropout_p", ValueError, {"dropout_p": float("nan")}),
    ("dropout_p", TypeError, {"dropout_p": "half"}),
    ("dropout_seed", TypeError, {"dropout_p": 0.5, "dropout_seed": 1.5}),
    ("dropout_seed", TypeError, {"dropout_p": 0.5, "dropout_seed": torch.ones(1)}),
    ("dropout_seed", ValueError, {"dropout_p": 0.5, "dropout_seed": 2**70}),
]


@pytest.mark.parametrize("name, error, options", BAD_ATTENTION, ids=range(len(BAD_ATTENTION)))
def test_attention(name, error, options):
    with pytest.raises(error, match=rf"\b{name}\b.*(expected|passed).*got|{name}.*{name}"):
        attention(**options)


CU_Q, CU_K = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7])
PACKED = torch.randn(5, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 6)
BAD_VARLEN = [
    ("query", ValueError, (Q, *PACKED[1:], CU_Q, CU_K)),
    ("cu_seqlens_q", ValueError, (*PACKED, torch.tensor([0, 2, 4]), CU_K)),
    ("cu_seqlens_q", ValueError, (*PACKED, torch.tensor([1, 2, 5]), CU_K)),
    ("cu_seqlens_q", ValueError, (*PACKED, torch.tensor([0, 6, 5]), CU_K)),
    ("cu_seqlens_q", TypeError, (*PACKED, torch.tensor([0.0, 2.0, 5.0]), CU_K)),
    ("cu_seqlens_k", ValueError, (*PACKED, CU_Q, torch.tensor([0, 7]))),
    ("cu_seqlens_k", TypeError, (*PACKED, CU_Q, None)),
    ("cu_seqlens_q", ValueError, (*PACKED, CU_Q[:0], CU_K)),
]


@pytest.mark.parametrize("name, error, arguments", BAD_VARLEN, ids=range(len(BAD_VARLEN)))
def test_attention_varlen(name, error, arguments):
    with pytest.raises(error, match=f"{name}: expected"):
        F.attention_varlen(*arguments)


BAD_NORM = [
    ("x", TypeError, {"x": 3}),
    ("x", TypeError, {"x": X.int()}),
    ("x", ValueError, {"x": torch.tensor(1.0)}),
    ("residual", ValueError, {"residual": X[:2]}),
    ("residual", ValueError, {"residual": X[None]}),
    ("residual", TypeError, {"residual": X.double()}),
    ("residual", TypeError, {"residual": X.int()}),
    ("weight", ValueError, {"weight": torch.ones(5)}),
    ("weight", TypeError, {"weight": torch.ones(6, dtype=torch.int8)}),
    ("bias", ValueError, {"weight": torch.ones(6), "bias": torch.ones(3, 6)}),
    ("bias", TypeError, {"bias": 0.5}),
    ("dropout_p", ValueError, {"dropout_p": -0.1}),
    ("residual_dtype", TypeError, {"residual_dtype": torch.float64}),
    ("residual_dtype", TypeError, {"residual_dtype": torch.float16}),
]


@pytest.mark.parametrize("function", [F.residual_layer_norm, F.residual_rms_norm])
@pytest.mark.parametrize("name, error, options", BAD_NORM, ids=range(len(BAD_NORM)))
def test_norms(name, error, options, function):
    with pytest.raises(error, match=f"{name}: expected"):
        function(**{"x": X, **options})


def test_devices():
    class Elsewhere:
        device = torch.device("cuda")

    class Unserved:
        device = torch.device("xpu")

    with pytest.raises(NotImplementedError, match=r"query.*of attention for CPU.*xpu"):
        tx.arguments.device_is_served(Unserved())
    for name, operation in (("query", "attention"), ("x", "residual_norm")):
        if tx.arguments.has_cuda_kernels(operation):
            tx.arguments.device_is_served(Elsewhere(), name, operation)
        else:
            with pytest.raises(NotImplementedError, match=rf"{name}.*of {operation} for CPU tensors only.*cuda"):
                tx.arguments.device_is_served(Elsewhere(), name, operation)
    with pytest.raises(ValueError, match="key: expected a tensor on cpu"):
        attention(key=K.to("meta"))


def test_head_dims_on_cuda():
    """Only shapes and device are looked at, so that no GPU is needed."""

    class Tensor:
        def __init__(self, width, device="cuda"):
            self.device, self.shape = torch.device(device), (1, 1, 4, width)

    check = tx.arguments.head_dims_are_served
    check(Tensor(256), Tensor(256))
    check(Tensor(300, "cpu"), Tensor(300, "cpu"))
    with pytest.raises(NotImplementedError, match="query: expected a head dimension up to 256 on CUDA, got 257"):
        check(Tensor(257), Tensor(64))
    with pytest.raises(NotImplementedError, match="value: expected a head dimension up to 256 on CUDA, got 300"):
        check(Tensor(64), Tensor(300))


def test_raw_operators_guard_memory():
    """Called past the Python functions they still refuse what would read outside a tensor."""
    forward = torch.ops.tformer_ext._attention_forward.default
    nothing = (None,) * 8
    numbers = (0, -1, -1, 1.0, 0.0, 0.0)
    forward(Q, K, V, *nothing, *numbers)
    for bad in (
        (Q, K[:1], V, *nothing, *numbers),
        (Q[:, :3], K, V, *nothing, *numbers),
        (Q.transpose(2, 3), K, V, *nothing, *numbers),
        (Q, K, V, torch.zeros(2, 4, 5, 6), *nothing[1:], *numbers),
        (Q, K, V, *nothing[:4], torch.tensor([9, 9], dtype=torch.int32), *nothing[5:], *numbers),
        (Q, K, V, *nothing[:4], torch.tensor([7], dtype=torch.int32), *nothing[5:], *numbers),
        (Q, K, V, *nothing, 3, -1, -1, 1.0, 0.0, 0.0),
        (Q, K, V, *nothing, 0, -1, -1, 1.0, 0.0, 0.5),
        (Q.long(), K.long(), V.long(), *nothing, *numbers),
    ):
        with pytest.raises(RuntimeError):
            forward(*bad)


def test_modules():
    with pytest.raises(ValueError, match="dropout: expected"):
        tx.ResidualLayerNorm(8, dropout=2.0)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        tx.ResidualLayerNorm(8)(torch.randn(3, 7))
    with pytest.raises(AttributeError, match="no attribute"):
        tx.does_not_exist  # noqa: B018
