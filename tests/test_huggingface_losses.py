"""The losses of transformers' language models after replace_modules: the stock ones' numbers, by the kernels."""

import copy
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from hf_models import DECODERS, ENCODERS, build, tokens  # noqa: E402
from tolerances import assert_close, assert_gradient_close  # noqa: E402

import tformer_ext as tx  # noqa: E402
from tformer_ext.huggingface import losses  # noqa: E402

CLASSES = 3000  # with as many rows, what the kernels are for
MODELS = {
    "GPT2": (*DECODERS["GPT2"], "causal_lm_loss"),
    "Llama": (*DECODERS["Llama"], "causal_lm_loss"),
    "ModernBert": ("ModernBertForMaskedLM", ENCODERS["ModernBert"][1], "masked_lm_loss"),
}


def model_of(name):
    kind, options, _ = MODELS[name]
    return build(name, kind, options | {"vocab_size": CLASSES}, "eager")


def labels_of(batch):
    return batch["input_ids"].where(batch["attention_mask"].bool(), -100)


def operators(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    return {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model, batch = model_of(name), tokens("right", length=30)
    batch["labels"] = labels_of(batch)

    def run():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    stock = run()
    assert "aten::_log_softmax" in operators(run)
    report = tx.replace_modules(model)
    assert MODELS[name][2] in {row.now.removeprefix("loss_function=") for row in report.swapped}
    torch.testing.assert_close(run(), stock, rtol=1e-4, atol=1e-5)
    found = operators(run)
    assert "tformer_ext::_cross_entropy_backward" in found and "aten::_log_softmax" not in found
    assert not tx.replace_modules(model).swapped
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.loss_function is model.loss_function
        undone = tx.restore_modules(twin)
        assert MODELS[name][2] in {row.was.removeprefix("loss_function=") for row in undone.swapped}
        assert "_loss_function" not in vars(twin)
    tx.restore_modules(model)
    assert "_loss_function" not in vars(model) and "aten::_log_softmax" in operators(run)


@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["ForCausalLM", "ForMaskedLM", "shifted"])
def test_functions(kind, dtype, items):
    """Against the stock ones in float64, whose own logits are widened to float32 first."""
    stock = transformers.loss.loss_utils.LOSS_MAPPING["ForMaskedLM" if kind == "ForMaskedLM" else "ForCausalLM"]
    fused = losses.FUSED[stock.__name__]
    logits, labels = torch.randn(2, 30, CLASSES).to(dtype), torch.randint(0, CLASSES, (2, 30))
    labels[0, 3:9] = -7
    options = {"num_items_in_batch": items, "ignore_index": -7, "output_hidden_states": True}
    if kind == "shifted":
        options["shift_labels"], labels = labels, None

    def run(function, kind):
        x = logits.detach().to(kind).requires_grad_()
        loss = function(x, labels, CLASSES, **options)
        return loss.detach(), *torch.autograd.grad(loss, x)

    actual, same = run(fused, dtype), run(stock, dtype)
    assert actual[0].dtype == same[0].dtype == torch.float32 and actual[1].dtype == same[1].dtype == dtype
    rows, wanted = logits.double().view(-1, CLASSES).requires_grad_(), labels
    if kind == "ForCausalLM":
        wanted = torch.nn.functional.pad(labels, (0, 1), value=-7)[:, 1:]
    wanted = (options["shift_labels"] if kind == "shifted" else wanted).reshape(-1)
    golden = torch.nn.functional.cross_entropy(rows, wanted, ignore_index=-7, reduction="sum")
    golden = golden / ((wanted != -7).sum() if items is None else items)
    (of_x,) = torch.autograd.grad(golden, rows)
    assert_close(actual[0], golden.detach(), same[0], "loss")
    assert_gradient_close(actual[1].float(), of_x.view(logits.shape), same[1].float(), "logits")


def test_what_is_not_the_kernels_is_the_stock_loss(monkeypatch):
    logits, labels = torch.randn(2, 9, 50), torch.randint(0, 50, (2, 9))
    stock = transformers.loss.loss_utils.ForCausalLMLoss
    assert torch.equal(losses.causal_lm_loss(logits, labels, 50), stock(logits, labels, 50))
    wide = torch.randn(2, 40, CLASSES)
    with pytest.raises(IndexError, match="out of bounds"):
        losses.causal_lm_loss(wide, torch.full((2, 40), CLASSES), CLASSES)
    strided = wide.transpose(0, 1)
    labels = torch.randint(0, CLASSES, (40, 2))
    with pytest.raises(RuntimeError, match="view"):  # as the stock one
        losses.causal_lm_loss(strided, labels, CLASSES)
    compiled = torch.compile(losses.causal_lm_loss, backend="aot_eager", fullgraph=True)
    labels = torch.randint(0, CLASSES, (2, 40))
    torch.testing.assert_close(compiled(wide, labels, CLASSES), stock(wide, labels, CLASSES))


def test_which_models_have_a_loss_of_ours():
    def loss_of(model):
        tx.replace_modules(model)
        return vars(model).get("_loss_function")

    own = model_of("GPT2")
    own.loss_function = print
    left = model_of("GPT2")
    tx.replace_modules(left, lambda module, name: module is not left)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.LlamaConfig(**small, vocab_size=99, num_labels=3, pad_token_id=0)
    assert loss_of(model_of("GPT2")) is losses.causal_lm_loss
    assert loss_of(own) is print and "_loss_function" not in vars(left)
    assert loss_of(transformers.LlamaModel(config)) is None
    assert loss_of(transformers.LlamaForSequenceClassification(config)) is None
    model = model_of("GPT2")
    tx.replace_modules(model)
    model.loss_function = print  # since then
    tx.restore_modules(model)
    assert model.loss_function is print


def test_modules():
    model = torch.nn.ModuleDict({"loss": torch.nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3)})
    stock = copy.deepcopy(model)
    tx.replace_modules(model)
    assert type(model["loss"]) is tx.CrossEntropyLoss
    logits, target = torch.randn(40, CLASSES), torch.randint(0, CLASSES, (40,))
    torch.testing.assert_close(model["loss"](logits, target), stock["loss"](logits, target))
    tx.restore_modules(model)
    assert type(model["loss"]) is torch.nn.CrossEntropyLoss
