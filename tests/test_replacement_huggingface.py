"""replace_modules on transformers models: norms, residual blocks and attention against the stock models."""

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

from hf_models import CLIP, DECODERS, ENCODERS, GIT, GROUPED, SEQ2SEQS, VISION, build, first_output, tokens  # noqa: E402
from tolerances import assert_close, assert_gradient_close  # noqa: E402

import tformer_ext as tx  # noqa: E402
from tformer_ext import functional as F  # noqa: E402
from tformer_ext.huggingface import blocks  # noqa: E402
from tformer_ext.modules import linear  # noqa: E402
from tformer_ext.ops import products  # noqa: E402

MODELS = {**ENCODERS, **DECODERS, **SEQ2SEQS}
MODELS["GPTNeoX in series"] = (DECODERS["GPTNeoX"][0], {**DECODERS["GPTNeoX"][1], "use_parallel_residual": False})
MODELS["Gemma"] = ("GemmaForCausalLM", GROUPED)
# Sums that are one operation with the norm that follows, in two layers.
SUMS = {
    "Bert": 4, "Roberta": 4, "Electra": 4, "DistilBert": 4, "GPT2": 2, "GPTNeoX in series": 2, "OPT": 2, "Llama": 2,
    "Mistral": 2, "Qwen2": 2, "Qwen3": 2, "Gemma": 2, "Bart": 10, "Marian": 10,
}  # fmt: skip


@pytest.fixture
def sums(monkeypatch):
    """Counts the calls of residual norms that were given a residual."""
    counted = []

    def watch(name):
        function = getattr(F, name)

        def watched(x, residual=None, *args, **kwargs):
            if residual is not None:
                counted.append(name)
            return function(x, residual, *args, **kwargs)

        monkeypatch.setattr(F, name, watched)

    watch("residual_layer_norm")
    watch("residual_rms_norm")
    return counted


def stock(name, **options):
    head, defaults = MODELS[name]
    return build(name.split()[0], head, defaults | options, "eager")


def results(model, name, batch):
    """Outputs where there is no padding, gradients, and hidden states."""
    more = {"decoder_input_ids": batch["input_ids"]} if name in SEQ2SEQS else {}
    kept = batch["attention_mask"].bool()
    model.zero_grad()
    output = model(**batch, **more, output_hidden_states=True)
    states = output.decoder_hidden_states if name in SEQ2SEQS else output.hidden_states
    out = first_output(output)[kept]
    out.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out, gradients, [state[kept] for state in states]


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_attention_that_was_chosen_before_gets_the_masks_it_adds(side):
    model, batch = build("Git", *GIT, "eager"), tokens(side)
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**batch).last_hidden_state[kept]
        tx.replace_modules(model)
        assert model.config._attn_implementation == "tformer_ext"
        replaced = model(**batch).last_hidden_state[kept]
    torch.testing.assert_close(replaced, stock, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_same_results(name, training, sums):
    none = {}
    if training:
        model = stock(name)
        none = {n: 0.0 for n in vars(model.config) if "dropout" in n or n.endswith("_pdrop")}
        none = {n: p for n, p in none.items() if isinstance(getattr(model.config, n), float)}
    model, batch = stock(name, **none).train(training), tokens("right")
    expected = results(model, name, batch)
    assert not sums
    report = tx.replace_modules(model)
    actual = results(model, name, batch)
    assert len(sums) == SUMS.get(name, 0)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=3e-5)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-4, atol=3e-5)
    assert actual[1].keys() == expected[1].keys()
    for n, gradient in expected[1].items():
        bound = 1e-5 + 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(actual[1][n], gradient, rtol=1e-3, atol=bound, msg=n)
    assert report.swapped[0].now == "attn_implementation='tformer_ext'"
    norms = [m for m in model.modules() if type(m).__name__.endswith(("LayerNorm", "RMSNorm"))]
    assert norms and all(type(m).__module__.startswith("tformer_ext") for m in norms)


@pytest.mark.parametrize("name, options, shape", [("CLIP", CLIP[1], (2, 3, 16, 16)), ("ViT", VISION, (2, 3, 16, 16))])
def test_vision(name, options, shape, sums):
    model = build(name, f"{name}Model", options, "eager").train()
    batch = {"pixel_values": torch.randn(shape)}
    if name == "CLIP":
        batch |= {"input_ids": torch.randint(3, 99, (2, 6)), "return_loss": True}

    def run():
        model.zero_grad()
        output = model(**batch)
        result = output.loss if name == "CLIP" else output.last_hidden_state
        result.square().mean().backward()
        return result, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = run()
    tx.replace_modules(model)
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4)
    assert len(sums) == {"CLIP": 4, "ViT": 2}[name]


@pytest.mark.parametrize("name", ["GPT2", "Llama", "OPT", "Bart"])
def test_generation(name):
    model, batch = stock(name), tokens("left", length=9)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**batch, **options)
    tx.replace_modules(model)
    assert torch.equal(model.generate(**batch, **options), expected)


def test_every_class_of_the_table_is_there():
    for known in blocks._FORM_OF:
        folder, _, name = known.partition(".")
        module = importlib.import_module(blocks._module_of(folder))
        fused = blocks.fused_class(getattr(module, name))
        assert issubclass(fused, getattr(module, name)) and fused.__name__ == name
        assert pickle.loads(pickle.dumps(fused)) is fused


def norm_classes():
    forms = [form for form in blocks.FORMS if issubclass(form, blocks.RMSNorm)]
    return [name for form in forms for name in blocks.FORMS[form].split()]


@pytest.mark.parametrize("known", norm_classes())
def test_norms(known):
    """Values, gradients and types of the results for all pairs of types of input and weight."""
    folder, _, name = known.partition(".")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    short = (torch.float32, torch.bfloat16)
    for of_x, of_weight in [(a, b) for a in short for b in short]:
        norm = getattr(module, name)(24, eps=1e-5)
        nn.init.normal_(norm.weight)
        norm.to(of_weight)
        x = torch.randn(2, 5, 24).to(of_x).requires_grad_()
        expected = norm(x)
        wanted = torch.autograd.grad(expected.square().sum(), (x, norm.weight))
        report = tx.replace_modules(norm)
        assert len(report.swapped) == 1
        actual = norm(x)
        assert actual.dtype == expected.dtype
        rounds = 2e-2 if torch.bfloat16 in (of_x, of_weight) else 1e-5
        torch.testing.assert_close(actual, expected, rtol=rounds, atol=rounds)
        got = torch.autograd.grad(actual.square().sum(), (x, norm.weight))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2 * rounds, atol=2 * rounds * b.abs().max().item())


@pytest.mark.parametrize("name", ["Bert", "Llama", "GPT2"])
def test_autocast(name):
    model, batch = stock(name), tokens("right")
    kept = batch["attention_mask"].bool()
    exact = first_output(model(**batch))[kept]
    with torch.autocast("cpu", torch.bfloat16):
        eager = first_output(model(**batch))[kept]
        tx.replace_modules(model)
        ours = first_output(model(**batch))[kept]
    assert ours.dtype == eager.dtype
    assert (ours - exact).norm() <= 2 * (eager - exact).norm()


@pytest.mark.parametrize("name, norm", [("Bert", "encoder.layer.0.output.LayerNorm"), ("GPT2", "transformer.h.1.ln_2"),
                                        ("Llama", "model.layers.0.post_attention_layernorm")])  # fmt: skip
def test_hooks_inside_a_block(name, norm):
    """A hook on the norm, before or after replacement, sees what it sees in the stock model, and may change it."""
    batch, seen = tokens(None), []

    def hook(module, inputs, output):
        seen.append((inputs[0], output))
        return output * 2

    model = stock(name)
    handle = model.get_submodule(norm).register_forward_hook(hook)
    expected = first_output(model(**batch))
    tx.replace_modules(model)
    torch.testing.assert_close(first_output(model(**batch)), expected, rtol=1e-4, atol=3e-5)
    handle.remove()
    model.get_submodule(norm).register_forward_hook(hook)
    torch.testing.assert_close(first_output(model(**batch)), expected, rtol=1e-4, atol=3e-5)
    assert len(seen) == 3
    torch.testing.assert_close(seen[1:], [seen[0]] * 2, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("name", ["Bert", "GPT2", "OPT", "Bart"])
def test_dropout(name):
    model, batch = stock(name).train(), tokens(None)
    tx.replace_modules(model)
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(first_output(model(**batch)))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_dropout_draws_nothing_one_after_the_other():
    """GPT-2 in training; the forward's operators as torch's profiler sees them."""
    model, batch = stock("GPT2").train(), tokens(None, length=60)

    def operators():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            first_output(model(**batch)).sum().backward()
        return {event.key for event in profiler.key_averages()}

    drawn = {"aten::bernoulli_", "aten::native_dropout", "aten::dropout"}
    assert drawn & operators()
    report = tx.replace_modules(model)
    assert ("torch Dropout", "tformer_ext Dropout") in {(row.was, row.now) for row in report.swapped}
    found = operators()
    assert not drawn & found and {"aten::gelu", "tformer_ext::_residual_norm_forward"} <= found
    tx.restore_modules(model)
    assert all(type(m) is nn.Dropout for m in model.modules() if isinstance(m, nn.Dropout))


@pytest.mark.parametrize("name, times", [("Bert", 4), ("GPTNeoX in series", 2), ("Bart", 10)])
def test_dropout_stays_within_the_block(name, times, monkeypatch):
    """The norm that follows the sum draws, whether the modules that hold the probability were replaced or not."""
    probabilities, function = [], F.residual_layer_norm

    def watched(x, residual=None, *args, dropout_p=0.0, **kwargs):
        probabilities.append(dropout_p)
        return function(x, residual, *args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "residual_layer_norm", watched)
    options = {"hidden_dropout": 0.1} if "NeoX" in name else {}
    for replaced in (nn.Dropout, tx.Dropout):
        model, batch = stock(name, **options).train(), tokens(None)
        tx.replace_modules(model, lambda m, _, kept=replaced: kept is tx.Dropout or not isinstance(m, nn.Dropout))
        assert {type(m) for m in model.modules() if isinstance(m, nn.Dropout)} <= {replaced}
        del probabilities[:]
        model(**batch, **({"decoder_input_ids": batch["input_ids"]} if name in SEQ2SEQS else {}))
        assert [p for p in probabilities if p] == [0.1] * times


def test_dropout_of_a_block_has_its_distribution():
    """Of dense's ones a share p is dropped and the others grow: the mean and the two levels that the norm makes."""
    config = transformers.BertConfig(hidden_size=64, hidden_dropout_prob=0.25)
    block = transformers.models.bert.modeling_bert.BertSelfOutput(config).train()
    nn.init.zeros_(block.dense.weight)
    nn.init.ones_(block.dense.bias)
    x = torch.zeros(500, 64)
    shares = []
    for _ in range(2):
        y = block(x, x)
        high = y > 0
        shares.append(high.float().mean().item())
        # what is left is 1 / 0.75, so that each row has the norm of its own pattern
        h = high / 0.75
        torch.testing.assert_close(y, nn.functional.layer_norm(h, (64,), eps=config.layer_norm_eps), atol=1e-5, rtol=0)
        tx.replace_modules(block)
    # 32000 elements: a standard deviation of 0.0024
    assert all(abs(share - 0.75) < 0.01 for share in shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transposed_linear(dtype, monkeypatch):
    monkeypatch.setattr(products, "widened_dtypes", lambda: {torch.bfloat16})
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(300, 256)).to(dtype)
    x = torch.randn(4, 20, 256, dtype=dtype, requires_grad=True)

    def run():
        y = model(x)
        return y, *torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y))

    expected = run()
    report = tx.replace_modules(model)
    assert [(row.was, row.now) for row in report.swapped] == [("transformers Conv1D", "tformer_ext Conv1D")]
    assert linear._is_taken(x, model[0].weight.t(), model[0].bias) == (dtype == torch.bfloat16)
    torch.testing.assert_close(run(), expected)
    assert type(pickle.loads(pickle.dumps(model))[0]) is type(model[0])
    tx.restore_modules(model)
    assert type(model[0]) is transformers.pytorch_utils.Conv1D


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation"])
def test_gelu(name, dtype):
    """As near to float64 as the stock class is, and by one operation, which keeps its input alone."""
    kind = getattr(transformers.activations, name)
    model = nn.Sequential(kind())
    given = torch.cat([torch.randn(4000) * 3, torch.tensor([0.0, -0.0, 40.0, -40.0, 1e4, -1e4])]).to(dtype)
    cotangent = torch.randn(given.shape).to(dtype)

    def run(function, dtype):
        x = given.to(dtype, copy=True).requires_grad_()
        y = function(x)
        return y, *torch.autograd.grad(y, x, cotangent.to(dtype))

    stock, golden = run(model, dtype), run(model, torch.float64)
    report = tx.replace_modules(model)
    assert [(row.was, row.now) for row in report.swapped] == [(f"transformers {name}", f"tformer_ext {name}")]
    actual = run(model, dtype)
    assert actual[0].dtype == dtype
    assert_close(actual[0], golden[0], stock[0])
    assert_gradient_close(actual[1], golden[1], stock[1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(given.requires_grad_())
    assert len(kept) == 1
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(type(twin[0]) is type(model[0]) for twin in copies)
    tx.restore_modules(model)
    assert type(model[0]) is kind and torch.equal(model(given), stock[0])


def test_what_has_nothing_to_fuse_says_why():
    why = {row.was: row.why for row in tx.replace_modules(stock("GPTNeoX")).left}
    assert why == {"transformers GPTNeoXLayer": "its residual is parallel: no sum is followed by a norm"}
    why = {row.was: row.why for row in tx.replace_modules(stock("OPT", do_layer_norm_before=False)).left}
    assert why == {"transformers OPTDecoderLayer": "it normalises after the sum (do_layer_norm_before=False)"}


def test_cross_attention():
    model = stock("GPT2", add_cross_attention=True)
    states, batch = torch.randn(3, 4, 32), tokens(None)
    expected = model(**batch, encoder_hidden_states=states).logits
    tx.replace_modules(model)
    torch.testing.assert_close(model(**batch, encoder_hidden_states=states).logits, expected, rtol=1e-4, atol=3e-5)


def test_attention_is_switched_back():
    model = build("CLIP", *CLIP, "sdpa")
    model.config.text_config._attn_implementation = "eager"
    report = tx.replace_modules(model)
    parts = (model.config, model.config.text_config, model.config.vision_config)
    assert [c._attn_implementation for c in parts] == ["tformer_ext"] * 3
    rows = [row.was for row in report.swapped if row.now == "attn_implementation='tformer_ext'"]
    assert sorted(rows) == ["attn_implementation='eager'"] + ["attn_implementation='sdpa'"] * 2
    assert not tx.replace_modules(model).swapped
    tx.restore_modules(model)
    assert [c._attn_implementation for c in parts] == ["sdpa", "eager", "sdpa"]
    assert not any(type(m).__module__.startswith("tformer_ext") for m in model.modules())


def test_attention_left_and_why():
    model = stock("Bert")
    report = tx.replace_modules(model, lambda module, _: isinstance(module, nn.LayerNorm))
    assert model.config._attn_implementation == "eager"
    assert {row.now for row in report.swapped} == {"tformer_ext ResidualLayerNorm"}
    tx.restore_modules(model)
    model.config.output_attentions = True
    why = [row.why for row in tx.replace_modules(model).left]
    assert why == ["output_attentions=True: only eager holds the weights"]


def test_a_model_within_another():
    outer = nn.ModuleDict({"text": stock("Bert"), "norm": nn.LayerNorm(4)})
    report = tx.replace_modules(outer)
    assert outer["text"].config._attn_implementation == "tformer_ext"
    assert {"text", "norm", "text.encoder.layer.0.output"} <= {row.name for row in report.swapped}
    tx.restore_modules(outer["text"])
    assert outer["text"].config._attn_implementation == "eager" and type(outer["norm"]) is tx.ResidualLayerNorm


def test_deepcopy():
    model, batch = stock("Llama"), tokens("right")
    tx.replace_modules(model)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**batch).logits, model(**batch).logits)
    tx.restore_modules(copied)
    assert copied.config._attn_implementation == "eager" and model.config._attn_implementation == "tformer_ext"
    torch.testing.assert_close(copied(**batch).logits, stock("Llama")(**batch).logits)


@pytest.mark.slow
def test_loaded_in_another_process(tmp_path):
    """Nothing has to be registered before."""
    model = stock("Llama")
    tx.replace_modules(model)
    batch = tokens("right")
    torch.save((model, batch, model(**batch).logits), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, batch, logits = torch.load(sys.argv[1], weights_only=False)\n"
        "assert 'tformer_ext.huggingface.blocks' in sys.modules\n"
        "assert torch.equal(model(**batch).logits, logits)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, timeout=120)


def test_saved_models_are_stock_models(tmp_path):
    model = stock("Bert")
    tx.replace_modules(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_activation_checkpointing():
    model, batch = stock("Llama").train(), tokens("right")
    expected = results(model, "Llama", batch)
    tx.replace_modules(model)
    model.gradient_checkpointing_enable()
    recomputed = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
    torch.testing.assert_close(results(model, "Llama", batch)[0], expected[0], rtol=1e-4, atol=3e-5)
    assert len(recomputed) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_compile_afterwards(name):
    model, batch = stock(name), tokens("right")
    tx.replace_modules(model)
    expected = first_output(model(**batch))[batch["attention_mask"].bool()]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = first_output(compiled(**batch))[batch["attention_mask"].bool()]
    torch.testing.assert_close(actual, expected)
    actual.square().mean().backward()
