"""replace_modules and restore_modules on torch.nn's modules."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import tformer_ext as tx


class Model(nn.Module):
    """One of everything that is covered, and some that is not."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16))
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(16, 4, 32, dropout, batch_first=True, norm_first=True), 2
        )
        self.attention = nn.MultiheadAttention(16, 2, dropout, batch_first=True)
        self.layer_norm = nn.LayerNorm(16, bias=False)
        self.rms_norm = nn.RMSNorm((5, 16))
        self.group_norm = nn.GroupNorm(2, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids, padding=None):
        x = self.encoder(self.embedding(ids), src_key_padding_mask=padding)
        x = self.decoder(self.embedding(ids), x, memory_key_padding_mask=padding)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.dropout(self.rms_norm(self.layer_norm(x))))


IDS = torch.arange(10).view(2, 5)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CLASSES = {
    "encoder": tx.TransformerEncoder,
    "encoder.layers.0": tx.TransformerEncoderLayer,
    "encoder.layers.1.self_attn": tx.MultiheadAttention,
    "encoder.layers.1.norm1": tx.ResidualLayerNorm,
    "encoder.norm": tx.ResidualLayerNorm,
    "decoder": tx.TransformerDecoder,
    "decoder.layers.1": tx.TransformerDecoderLayer,
    "decoder.layers.0.multihead_attn": tx.MultiheadAttention,
    "attention": tx.MultiheadAttention,
    "layer_norm": tx.ResidualLayerNorm,
    "rms_norm": tx.ResidualRMSNorm,
    "encoder.layers.0.linear1": tx.Linear,
    "encoder.layers.0.dropout": tx.Dropout,
    "decoder.layers.1.dropout3": tx.Dropout,
    "dropout": tx.Dropout,
    "head": tx.Linear,
}


def results(model, *inputs):
    """Output and gradients."""
    model.zero_grad()
    out = model(*inputs)
    out.square().mean().backward()
    return [out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def types(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_same_results(training, padding):
    model = Model().train(training)
    expected = results(model, IDS, padding)
    tx.replace_modules(model)
    torch.testing.assert_close(results(model, IDS, padding), expected, rtol=1e-4, atol=1e-6)


def test_transformer():
    model = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 6, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)

    def run(model):
        return model(x, x, tgt_mask=mask, tgt_is_causal=True)

    expected = run(model)
    report = tx.replace_modules(model)
    assert type(model) is tx.Transformer and report.swapped[0].name == ""
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


def test_the_objects_stay():
    model = Model()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    state = model.state_dict()
    model.encoder.layers[0].norm1.weight.requires_grad_(False)
    model.attention.eval()
    flags = {name: m.training for name, m in modules.items()}
    tx.replace_modules(model)
    assert all(m is modules[name] for name, m in model.named_modules())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert model.head.weight is model.embedding.weight
    assert not model.encoder.layers[0].norm1.weight.requires_grad
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    for name, cls in CLASSES.items():
        assert type(model.get_submodule(name)) is cls, name
    assert type(model.group_norm) is nn.GroupNorm


def test_training_goes_on():
    """An optimizer that was made, and has stepped, before; the stock model that goes on beside it."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stock = copy.deepcopy(model)
    stock_optimizer = torch.optim.AdamW(stock.parameters(), lr=1e-2)

    def step(model, optimizer):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    for n in range(6):
        if n == 2:
            tx.replace_modules(model)
        if n == 4:
            tx.restore_modules(model)
        assert step(model, optimizer) == pytest.approx(step(stock, stock_optimizer), rel=1e-4)


def test_hooks_are_kept():
    model = Model().eval()
    called = []
    model.encoder.layers[1].norm2.register_forward_hook(lambda *_: called.append("norm"))
    model.attention.out_proj.register_forward_hook(lambda *_: called.append("out_proj"))
    model.layer_norm.register_full_backward_hook(lambda *_: called.append("backward"))
    tx.replace_modules(model)
    model.decoder.layers[0].register_forward_hook(lambda *_: called.append("decoder"))
    model.decoder.layers[0].dropout1.register_forward_pre_hook(lambda *_: called.append("dropout"))
    model(IDS).sum().backward()
    assert sorted(called) == ["backward", "decoder", "dropout", "norm", "out_proj"]


def test_report():
    model = Model()
    report = tx.replace_modules(model)
    swapped = {row.name: row for row in report.swapped}
    assert set(CLASSES) <= set(swapped) and not report.left
    assert swapped["layer_norm"].was == "torch LayerNorm"
    assert swapped["layer_norm"].now == "tformer_ext ResidualLayerNorm"
    lines = [line.split() for line in str(report).splitlines()]
    # 2 of each encoder layer, 3 of each decoder layer, 2 others
    assert ["torch", "LayerNorm", "tformer_ext", "ResidualLayerNorm", "12", "encoder.layers.0.norm1"] in lines
    assert str(report).startswith(f"{len(report.swapped)} swapped, 0 left")


def test_twice_is_once():
    model = Model()
    tx.replace_modules(model)
    before = types(model)
    report = tx.replace_modules(model)
    assert not report.swapped and types(model) == before
    assert {row.why for row in report.left} == {"replaced already"}
    tx.restore_modules(model)
    assert type(model.layer_norm) is nn.LayerNorm


def test_restored_exactly():
    model = Model()
    own = tx.ResidualLayerNorm(16, dropout=0.1)  # not ours to take away
    model.own = own
    before = types(model), {name: dict(m.__dict__) for name, m in model.named_modules()}
    tx.replace_modules(model)
    report = tx.restore_modules(model)
    after = types(model), {name: dict(m.__dict__) for name, m in model.named_modules()}
    assert after[0] == before[0] and after[1].keys() == before[1].keys()
    for name, attributes in before[1].items():
        assert after[1][name] == attributes, name
    assert {"layer_norm", "encoder"} <= {row.name for row in report.swapped}
    assert not tx.restore_modules(model).swapped


def test_filter():
    asked = []

    def only_norms_of_the_encoder(module, name):
        asked.append(name)
        return isinstance(module, nn.LayerNorm) and name.startswith("encoder")

    model = Model()
    report = tx.replace_modules(model, only_norms_of_the_encoder)
    assert {row.name for row in report.swapped} == {"encoder.norm"} | {
        f"encoder.layers.{n}.norm{m}" for n in (0, 1) for m in (1, 2)
    } | {"encoder"}  # its use_nested_tensor
    assert set(CLASSES) <= set(asked) and "embedding" not in asked and "group_norm" not in asked
    assert type(model.encoder) is nn.TransformerEncoder and type(model.decoder.layers[0].norm1) is nn.LayerNorm
    assert {row.why for row in report.left} == {"filter_fn"}


def test_what_is_left_and_why():
    class OwnNorm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    class FancyRMSNorm(nn.Module):
        pass

    class OwnLinear(nn.Linear):
        pass

    class OwnDropout(nn.Dropout):
        pass

    model = nn.ModuleDict({"own": OwnNorm(4), "fancy": FancyRMSNorm(), "set": nn.LayerNorm(4), "relu": nn.ReLU()})
    model["linear"], model["dropout"] = OwnLinear(4, 4), OwnDropout()
    model["set"].forward = lambda x: x
    report = tx.replace_modules(model)
    assert not report.swapped
    why = {row.name: row.why for row in report.left}
    assert "subclass of torch.nn.LayerNorm" in why["own"] and "forward was set" in why["set"]
    assert "subclass of torch.nn.Linear" in why["linear"] and "subclass of torch.nn.Dropout" in why["dropout"]
    assert "no fused form" in why["fancy"] and "relu" not in why


@pytest.mark.parametrize("filter_fn", [None, lambda m, _: isinstance(m, nn.TransformerEncoderLayer)])
def test_no_nested_tensors_reach_a_built_encoder(filter_fn):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()
    assert model[0].use_nested_tensor
    x = torch.randn(2, 5, 16)
    nested = []
    with torch.no_grad():
        expected = model[0](x, src_key_padding_mask=PADDING)
        report = tx.replace_modules(model, filter_fn)
        assert not model[0].use_nested_tensor
        assert any(row.now == "use_nested_tensor=False" for row in report.swapped)
        model[0].layers[0].register_forward_pre_hook(lambda _, inputs: nested.append(inputs[0].is_nested))
        actual = model[0](x, src_key_padding_mask=PADDING)
    assert nested == [False] and actual.shape == expected.shape
    torch.testing.assert_close(actual[~PADDING], expected[~PADDING], rtol=1e-4, atol=1e-5)
    tx.restore_modules(model)
    assert model[0].use_nested_tensor and type(model[0].layers[0]) is nn.TransformerEncoderLayer


@pytest.mark.parametrize("dropout", [0.3])
def test_dropout(dropout):
    model = Model(dropout)
    tx.replace_modules(model)
    torch.manual_seed(3)
    first = model(IDS)
    torch.manual_seed(3)
    assert torch.equal(model(IDS), first)
    assert not torch.equal(model(IDS), first)
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how):
    model = Model().eval()
    tx.replace_modules(model)
    expected = model(IDS, PADDING)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert types(copied) == types(model) and torch.equal(copied(IDS, PADDING), expected)
    tx.restore_modules(copied)
    assert type(copied.layer_norm) is nn.LayerNorm and type(model.layer_norm) is tx.ResidualLayerNorm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: nested tensors are a prototype
        torch.testing.assert_close(copied(IDS, PADDING)[~PADDING], expected[~PADDING], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compile_afterwards():
    model = Model().eval()
    tx.replace_modules(model)
    expected = results(model, IDS, PADDING)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, IDS, PADDING), expected)


def test_one_module_in_two_places():
    norm = nn.LayerNorm(8)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    report = tx.replace_modules(model)
    assert len(report.swapped) == 1 and model[0] is model[2] is norm and type(norm) is tx.ResidualLayerNorm


def test_16_bits_and_unusual_norms():
    """Norms of several dimensions, without parameters, and in bfloat16 give what torch's give."""
    cases = [
        (nn.LayerNorm((3, 8)), torch.randn(2, 3, 8)),
        (nn.LayerNorm((3, 8), elementwise_affine=False), torch.randn(2, 3, 8)),
        (nn.LayerNorm(8).bfloat16(), torch.randn(2, 3, 8).bfloat16()),
        (nn.LayerNorm(8), torch.randn(2, 3, 8).bfloat16()),
        (nn.RMSNorm(8, elementwise_affine=False), torch.randn(2, 3, 8)),
        (nn.RMSNorm((3, 8)).double(), torch.randn(2, 3, 8).double()),
    ]
    for norm, x in cases:
        expected = norm(x)
        tx.replace_modules(norm)
        assert type(norm) in (tx.ResidualLayerNorm, tx.ResidualRMSNorm)
        torch.testing.assert_close(norm(x), expected)


def test_what_is_no_model():
    for wrong in (3, None, [nn.LayerNorm(3)], nn.LayerNorm):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
            tx.replace_modules(wrong)
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
            tx.restore_modules(wrong)
    with pytest.raises(TypeError, match="filter_fn: expected a function"):
        tx.replace_modules(nn.LayerNorm(3), "norms")


def scripted():
    return torch.jit.script(nn.Sequential(nn.LayerNorm(4)))


def traced():
    return torch.jit.trace(nn.Sequential(nn.LayerNorm(4)), torch.randn(2, 4))


def compiled_in_place():
    model = nn.Sequential(nn.Sequential(nn.LayerNorm(4)), nn.LayerNorm(4))
    model[0].compile()
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: torch.compile(nn.LayerNorm(4)), "a compiled model; pass the original one"),
        (compiled_in_place, "a compiled model, in 0; "),
        (lambda: nn.DataParallel(nn.LayerNorm(4)), "a DataParallel; pass model.module"),
        (scripted, "a scripted or traced model; "),
        (traced, "a scripted or traced model; "),
    ],
)
def test_what_comes_too_late(make, message):
    model = make()
    before = types(model)
    for function in (tx.replace_modules, tx.restore_modules):
        with pytest.raises(TypeError, match=message):
            function(model)
    assert types(model) == before


def test_wrapped_for_several_machines(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match=r"a DistributedDataParallel; pass model\.module"):
            tx.replace_modules(DistributedDataParallel(nn.Sequential(nn.LayerNorm(4))))
        model = Model()
        tx.replace_modules(model)
        out = DistributedDataParallel(model)(IDS)
        torch.testing.assert_close(out, model(IDS))
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = nn.Sequential(nn.LayerNorm(4))
        fully_shard(sharded, mesh=mesh)
        with pytest.raises(TypeError, match="fully_shard has changed; call this before"):
            tx.replace_modules(sharded)
    finally:
        distributed.destroy_process_group()


def test_changed_since():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    tx.replace_modules(model)
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
    with pytest.raises(TypeError, match="expected 1 to be a tformer_ext ResidualLayerNorm"):
        tx.restore_modules(model)
    assert type(model[0]) is tx.ResidualLayerNorm
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    tx.restore_modules(model)
    assert type(model[0]) is type(model[1]) is nn.LayerNorm
