"""Training steps of transformers' models that take their loss without logits: replace_modules, keep_logits=False."""

import copy
import inspect
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from hf_models import DECODERS, ENCODERS, SEQ2SEQS, WHISPER, build, tokens  # noqa: E402

import tformer_ext as tx  # noqa: E402
from tformer_ext.huggingface.logits import DeferredLogits, is_installed  # noqa: E402
from tformer_ext.modules.linear import linear  # noqa: E402
from tformer_ext.ops import linear_cross_entropy as ops  # noqa: E402
from tformer_ext.ops import products  # noqa: E402

CLASSES = 3000
MODELS = {
    **{name: DECODERS[name] for name in ("GPT2", "GPTNeoX", "Llama", "Qwen3")},
    **SEQ2SEQS,
    "Bert": ("BertForMaskedLM", ENCODERS["Bert"][1]),
    "Roberta": ("RobertaForMaskedLM", ENCODERS["Roberta"][1]),
    "DistilBert": ("DistilBertForMaskedLM", ENCODERS["DistilBert"][1]),
    "ModernBert": ("ModernBertForMaskedLM", ENCODERS["ModernBert"][1]),
    "Whisper": WHISPER,
}


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """However few the logits are."""
    monkeypatch.setattr(ops, "_LEAST_LOGITS", 0)


def model_of(name, **more):
    kind, options = MODELS[name]
    return build(name, kind, options | {"vocab_size": CLASSES} | more, "eager")


def batch_of(name):
    batch = tokens("right", length=30)
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    if name == "Whisper":
        return {"input_features": torch.randn(3, 8, 20), "labels": labels}
    return batch | {"labels": labels}


def train(model, batch):
    """A step without dropout's chance: (output, loss, gradients), and the operators that ran."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        output = model(**batch)
        output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output, (output.loss.detach(), gradients), {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(name, dtype):
    without = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout_rate": 0.0,
               "attn_pdrop": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    model, batch = model_of(name, **without).to(dtype), batch_of(name)
    if name == "Whisper":
        batch["input_features"] = batch["input_features"].to(dtype)
    if getattr(model, "final_logits_bias", None) is not None:
        model.final_logits_bias.normal_()
    tx.replace_modules(model)
    stock, expected, _ = train(model, batch)
    report = tx.replace_modules(model, keep_logits=False)
    assert [row.now for row in report.swapped] == ["a loss without logits"]
    output, actual, operators = train(model, batch)
    assert output.logits is None and stock.logits.shape[-1] == CLASSES
    assert "tformer_ext::_cross_entropy_backward_" in operators and "aten::_log_softmax" not in operators
    wide = dtype == torch.float32
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5 if wide else 0.01, atol=1e-5)
    assert actual[0].dtype == expected[0].dtype and actual[1].keys() == expected[1].keys()
    whole = torch.cat([g.flatten() for g in expected[1].values()]).norm()
    for key, gradient in actual[1].items():  # those of keys' biases are nothing but rounding
        size = torch.maximum(expected[1][key].norm(), whole / 100)
        assert (gradient - expected[1][key]).norm() < (1e-5 if wide else 0.03) * size, key


@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)], ids=["mean", "int", "tensor"])
def test_items_of_a_batch(items):
    model, batch = model_of("Llama"), batch_of("Llama")
    options = {} if items is None else {"num_items_in_batch": items}
    expected = train(model, batch | options)[1]
    tx.replace_modules(model, keep_logits=False)
    output, actual, _ = train(model, batch | options)
    assert output.logits is None
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_all_other_calls_have_logits():
    model, batch = model_of("GPT2"), batch_of("GPT2")
    tx.replace_modules(model, keep_logits=False)
    stock = copy.deepcopy(model)
    tx.restore_modules(stock)
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    model.train()
    assert type(model(**unlabelled).logits) is torch.Tensor
    with torch.no_grad():
        assert type(model(**batch).logits) is torch.Tensor
    assert model(**batch).logits is None and model(**batch, return_dict=False)[1] is None
    names = list(inspect.signature(transformers.GPT2LMHeadModel.forward).parameters)
    positional = [batch.get(name) for name in names[1 : names.index("labels") + 1]]
    assert model(*positional).logits is None
    model.eval(), stock.eval()
    torch.testing.assert_close(model(**batch).logits, stock(**batch).logits)
    compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    assert type(compiled(**batch).logits) is torch.Tensor
    assert "forward" not in vars(model.lm_head)


def test_of_few_logits(monkeypatch):
    """Their loss is torch's, of computed ones; they are gone all the same."""
    monkeypatch.setattr(ops, "_LEAST_LOGITS", 1 << 40)
    for name in ("Llama", "Bert"):
        model, batch = model_of(name), batch_of(name)
        tx.replace_modules(model)
        expected = train(model, batch)
        tx.replace_modules(model, keep_logits=False)
        output, actual, operators = train(model, batch)
        assert output.logits is None and "tformer_ext::_cross_entropy_backward_" not in operators
        torch.testing.assert_close(actual, expected[1], rtol=1e-4, atol=1e-5)


def test_logits_that_the_model_reads_are_there():
    """Gemma 2 bends them; a layer with a hook is called as it stands."""
    kind, options = DECODERS["Gemma2"]
    model, batch = build("Gemma2", kind, options | {"vocab_size": CLASSES}, "eager"), batch_of("Gemma2")
    tx.replace_modules(model)
    expected = train(model, batch)
    tx.replace_modules(model, keep_logits=False)
    output, actual, _ = train(model, batch)
    torch.testing.assert_close((output.logits, actual), (expected[0].logits, expected[1]), rtol=1e-4, atol=1e-4)
    hooked = model_of("Llama")
    tx.replace_modules(hooked, keep_logits=False)
    seen = []
    hooked.lm_head.register_forward_hook(lambda module, x, y: seen.append(type(y)))
    assert type(train(hooked, batch)[0].logits) is torch.Tensor and seen == [torch.Tensor]


def test_a_failed_step_leaves_nothing_behind():
    model, batch = model_of("Llama"), batch_of("Llama")
    tx.replace_modules(model, keep_logits=False)
    model.train()
    with pytest.raises(IndexError, match="out of bounds"):
        model(**batch | {"labels": batch["labels"].clamp(min=0) + CLASSES})
    assert "forward" not in vars(model.lm_head)
    assert model(**batch).logits is None


def test_operands_that_do_not_fit_are_told_by_the_layer():
    model, batch = model_of("Llama"), batch_of("Llama")
    tx.replace_modules(model, keep_logits=False)
    model.lm_head.double()
    with pytest.raises(RuntimeError, match="same dtype"):
        train(model, batch)
    assert "forward" not in vars(model.lm_head)


def test_an_inner_model_leaves_its_logits_to_the_outer():
    class Outer(transformers.LlamaPreTrainedModel):
        def __init__(self, inner):
            super().__init__(inner.config)
            self.inner = inner

        def get_output_embeddings(self):
            return self.inner.lm_head

        def forward(self, input_ids, labels=None):
            output = self.inner(input_ids=input_ids)
            loss = torch.nn.functional.cross_entropy(output.logits.view(-1, CLASSES), labels.view(-1))
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=output.logits)

    model = Outer(model_of("Llama"))
    batch = {"input_ids": torch.randint(0, CLASSES, (3, 30)), "labels": torch.randint(0, CLASSES, (3, 30))}
    expected = train(model, batch)[1]
    assert len([row for row in tx.replace_modules(model, keep_logits=False).swapped if "loss" in row.now]) == 3
    output, actual, _ = train(model, batch)
    assert output.logits is None
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_reports_copies_and_restoring():
    def rows(report, now):
        return [row for row in (report.swapped if now else report.left) if "logits" in f"{row.was} {row.now}"]

    model, batch = model_of("Llama"), batch_of("Llama")
    assert not rows(tx.replace_modules(model), True) and not is_installed(model)
    (row,) = rows(tx.replace_modules(model, keep_logits=False), True)
    assert (row.name, row.was, row.now) == ("", "logits in training", "a loss without logits")
    (row,) = rows(tx.replace_modules(model, keep_logits=False), False)
    assert row.why == "replaced already"
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert train(twin, batch)[0].logits is None
        (row,) = rows(tx.restore_modules(twin), True)
        assert (row.was, row.now) == ("a loss without logits", "logits in training")
        tables = "forward_pre_hooks", "forward_pre_hooks_with_kwargs", "forward_hooks", "forward_hooks_always_called"
        assert not any(getattr(twin, f"_{table}") for table in tables)
        assert train(twin, batch)[0].logits is not None
    own = []
    model.register_forward_hook(lambda *_: own.append(1))
    tx.replace_modules(model, keep_logits=False)
    tx.restore_modules(model)
    train(model, batch)
    assert own
    (row,) = rows(tx.replace_modules(model_of("Llama"), lambda m, name: name != "", keep_logits=False), False)
    assert row.why == "filter_fn"
    classifier = build("Llama", "LlamaForSequenceClassification", DECODERS["Llama"][1], "eager")
    for other in (classifier, torch.nn.Linear(3, 3)):
        (row,) = rows(tx.replace_modules(other, keep_logits=False), False)
        assert row.why.startswith("none of transformers' models")
    with pytest.raises(TypeError, match="keep_logits: expected a bool, got str"):
        tx.replace_modules(model, keep_logits="no")


def layer_of(dtype=torch.float32):
    from tformer_ext.huggingface.logits import _Layer

    x, weight, bias = torch.randn(2, 9, 5), torch.randn(60, 5), torch.randn(60)
    x, weight, bias = (t.to(dtype).requires_grad_() for t in (x, weight, bias))
    return _Layer(x, weight, bias), linear(x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_deferred_logits_are_those_of_the_layer(dtype):
    layer, logits = layer_of(dtype)
    other = torch.randn(1, 60).to(dtype)
    kept = {
        "view": lambda t: t.view(-1, 60),
        "size": lambda t: t.view(-1, t.size(-1)),
        "tuple": lambda t: t.reshape((3, 6, 60)),
        "contiguous": lambda t: t.contiguous(),
        "bias": lambda t: (t + other).view(18, 60),
        "vector": lambda t: t + other[0],
    }
    made = {
        "columns": lambda t: t.view(-1, 30),
        "bits": lambda t: t.detach().view(torch.int16),
        "sum": lambda t: t + 1,
        "weighted": lambda t: torch.add(t, other, alpha=2),
        "reversed": lambda t: other + t,
        "all": lambda t: t + other.expand(2, 9, 60),
        "index": lambda t: t[..., :-1, :],
        "soft": lambda t: torch.tanh(t / 3) * 3,
        "mean": lambda t: t.float().softmax(-1).mean(),
        "both": lambda t: torch.cat([t, t]),
        "named": lambda t: t.view(size=(18, 60)),
        "format": lambda t: t.float(memory_format=torch.contiguous_format),
        "item": lambda t: (t.argmax(-1) == 3).sum().item(),
    }
    (made if dtype == torch.float64 else kept)["float"] = lambda t: t.float()
    for name, function in (kept | made).items():
        deferred = DeferredLogits(layer, logits.shape, dtype)
        assert (deferred.shape, deferred.dtype, deferred.device) == (logits.shape, dtype, logits.device)
        actual, expected = function(deferred), function(logits)
        assert isinstance(actual, DeferredLogits) == (name in kept), name
        if name in kept:
            assert actual.shape == expected.shape and actual.dtype == expected.dtype
            actual = actual.compute()
        rounded = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 and name in ("bias", "vector") else {}
        torch.testing.assert_close(actual, expected, **rounded)  # a sum that is rounded once instead of twice
    with pytest.raises(RuntimeError, match="invalid for input"):
        DeferredLogits(layer, logits.shape, dtype).view(5, 60)
    with pytest.raises(NotImplementedError, match="no memory"), torch._C.DisableTorchFunctionSubclass():
        torch.neg(DeferredLogits(layer, logits.shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_of_deferred_logits(dtype, monkeypatch):
    monkeypatch.setattr(ops, "_LEAST_CLASSES", 0)
    monkeypatch.setattr(products, "_COLUMNS", 32)
    layer, logits = layer_of(dtype)
    target = torch.randint(0, 60, (18,))
    leaves, classes = (layer.x, layer.weight, layer.bias), torch.rand(60)
    rounded = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1, "ignore_index": 3}, {"weight": classes}):
        for widen in (False, True):
            deferred = DeferredLogits(layer, logits.shape, dtype)
            losses = []
            for t in (deferred, logits):
                rows = (t.float() if widen else t).view(-1, 60)
                losses.append(torch.nn.CrossEntropyLoss(**options).to(rows.dtype)(rows, target))
            assert ("logits" in vars(layer)) == ("weight" in options) and not layer.are_read
            assert losses[0].dtype == losses[1].dtype
            torch.testing.assert_close(*losses)
            gradients = [torch.autograd.grad(loss.sum(), leaves, retain_graph=True) for loss in losses]
            torch.testing.assert_close(*gradients, **rounded)
            vars(layer).pop("logits", None)


def test_logits_that_were_read_first_are_those_of_the_loss():
    layer, logits = layer_of()
    deferred = DeferredLogits(layer, logits.shape, logits.dtype)
    rows = deferred.view(-1, 60)
    most = rows.argmax(-1)
    loss = torch.nn.functional.cross_entropy(rows, most)
    assert layer.are_read
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.view(-1, 60), most))


def test_under_autocast():
    model, batch = model_of("Llama"), batch_of("Llama")
    tx.replace_modules(model)

    def losses():
        with torch.autocast("cpu", torch.bfloat16):
            output, (loss, gradients), _ = train(model, batch)
        return output.logits, loss, gradients["lm_head.weight"]

    expected = losses()
    tx.replace_modules(model, keep_logits=False)
    actual = losses()
    assert expected[0].dtype == torch.bfloat16 and actual[0] is None and actual[1].dtype == torch.float32
    torch.testing.assert_close(actual[1:], expected[1:], rtol=0.02, atol=1e-3)
