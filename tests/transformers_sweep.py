"""Every model type of transformers, small and with random weights: eager attention against "tformer_ext", and against
replace_modules, which also trains without logits. Minutes; for a new version of transformers, not for every change:
`make sweep SWEEP_ARGS="bloom gpt2"`.

A model is the same, differs, fails, is refused by transformers (which looks its attention up by names that it knows),
or was not asked: a small one cannot be built, or runs with eager neither. Some differ between eager and sdpa: one of
the two is enough. Ends with 1 where one differs or fails.
"""

import argparse
import copy
import inspect
import os
import sys
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import torch
import transformers
from rich.console import Console
from rich.progress import track
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tformer_ext as tx
from tformer_ext.ops import linear_cross_entropy

HIDDEN, HEADS = 32, 4
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "encoder_hidden_size", "decoder_hidden_size"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_experts_per_tok", "multi_query_group_num"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "kv_channels", "rotary_dim"), HIDDEN // HEADS),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "query_pre_attn_scalar"), HIDDEN // HEADS),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 40),
    **dict.fromkeys(("n_inner", "ffn_hidden_size", "feed_forward_size"), 40),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "projection_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "num_mel_bins"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), 99),
    "hidden_size_per_layer_input": 8, "image_size": 32, "patch_size": 8, "sliding_window": 6, "max_window_layers": 1,
    "local_attention": 8, "global_attn_every_n_layers": 2, "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
# Tried in turn until a model runs: heads in groups; heads on their own, as latent attention wants them.
KEY_VALUE_HEADS = (2, HEADS)
MOST_PARAMETERS = 10_000_000
SECONDS = 120
SIDES = (None, "right", "left")  # of padding
TOLERANCE = 2e-4  # of float32, of the largest element


class NotAsked(Exception):
    """There is nothing to compare with."""


class Refused(Exception):
    """By transformers, as any attention_implementation that the model's code does not name."""


class Differs(Exception):
    """From stock."""


def shrink(config, key_value_heads):
    sizes = SIZES | {"num_key_value_heads": key_value_heads}
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value, key_value_heads)
        elif name in sizes and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, sizes[name])
        elif name in ("layer_types", "mlp_layer_types") and value:
            kinds = list(dict.fromkeys(value))[:2]
            setattr(config, name, kinds if len(kinds) == 2 else kinds * 2)
    return config


def build(cls, config, implementation):
    """A model whose weights are far from zero, so that attention matters; the same at every call."""
    torch.manual_seed(0)
    model = cls._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def build_stock(cls, config):
    """Models with eager attention, and with sdpa if it is supported; the first runs."""
    with torch.device("meta"):
        count = sum(p.numel() for p in cls._from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise NotAsked(f"{count} parameters")
    models = [build(cls, config, name) for name in ("eager", "sdpa")[: 1 + bool(cls._supports_sdpa)]]
    models[-1].load_state_dict(models[0].state_dict())
    forward(models[0], example(models[0], None)[0])
    return models


def build_ours(cls, config, weights):
    """{name: model} with the same weights and buffers as stock."""
    replaced = build(cls, config, "eager")
    replaced.load_state_dict(weights)
    tx.replace_modules(replaced, keep_logits=False)
    try:
        ours = build(cls, config, "tformer_ext")
    except KeyError as error:
        if error.args != ("tformer_ext",):
            raise
        return {"replaced": replaced}
    ours.load_state_dict(weights)
    return {"tformer_ext": ours, "replaced": replaced}


def example(model, side):
    """Keywords of forward, and which positions of the output count (None: all)."""
    generator = torch.Generator().manual_seed(1)
    takes, config, main = inspect.signature(model.forward).parameters, model.config, model.main_input_name
    ids, mask = torch.randint(3, 90, (3, 15), generator=generator), torch.ones(3, 15, dtype=torch.long)
    if side == "right":
        mask[1, 11:], mask[2, 4:] = 0, 0
    elif side == "left":
        mask[1, :4], mask[2, :11] = 0, 0
    batch, kept = {}, None
    if main == "input_ids":
        batch["input_ids"] = ids
        if side and "attention_mask" in takes:
            batch["attention_mask"], kept = mask, mask.bool()
    elif main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        channels = getattr(vision, "num_channels", 3)
        batch[main] = torch.randn(3, channels, SIZES["image_size"], SIZES["image_size"], generator=generator)
    elif main == "input_features":
        batch[main] = torch.randn(3, SIZES["num_mel_bins"], 128, generator=generator)
    elif main == "input_values":
        batch[main] = torch.randn(3, 4000, generator=generator)
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        batch["decoder_input_ids"] = ids[:, :11]  # a length of its own: all of them count
    return batch, kept


def tensors(output, name=""):
    """{name: tensor} of all floating tensors of an output, caches aside."""
    if isinstance(output, torch.Tensor):
        return {name: output} if output.is_floating_point() else {}
    if isinstance(output, (tuple, list)):
        output = dict(enumerate(output))
    found = {}
    if hasattr(output, "items"):
        for key, value in output.items():
            if key != "past_key_values":
                found |= tensors(value, f"{name}.{key}")
    return found


def compare(stock, ours, kept=None):
    """Nothing, or what differs."""
    stock, ours = tensors(stock), tensors(ours)
    if stock.keys() != ours.keys():
        return f"outputs {sorted(stock.keys() ^ ours.keys())}"
    for name, a in stock.items():
        b = ours[name]
        if kept is not None and a.shape[:2] == kept.shape:
            a, b = a[kept], b[kept]
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            return f"{name}: what is finite"
        a, b = a[finite], b[finite]
        if a.numel() and not (a - b).abs().max() <= TOLERANCE * (a.abs().max() + 1e-6):
            return f"{name} by {((a - b).abs().max() / a.abs().max()).item():.1e}"
    return None


def forward(model, batch):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**batch)


def generate(model, cache):
    """Scores of greedy generation."""
    torch.manual_seed(0)
    batch, _ = example(model, "right" if model.config.is_encoder_decoder else "left")
    batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_scores": True}
    options |= {"cache_implementation": cache, "disable_compile": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**batch, **options).scores)


def gradient(model):
    """All of it as one vector, with its norm as the largest element: what is zero but for rounding does not count."""
    batch, kept = example(model, "right")
    logits = model(**batch).logits
    (logits[kept] if kept is not None and kept.shape == logits.shape[:2] else logits).square().mean().backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return torch.cat([flat, flat.norm().view(1)])


def training_step(model):
    """(loss, gradient), by labels and without dropout: of the modules only the model itself is in training."""
    batch, kept = example(model, "right")
    ids = batch.get("input_ids", torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(2)))
    labels = (
        ids[:, :11].contiguous() if model.config.is_encoder_decoder else ids if kept is None else ids.where(kept, -100)
    )
    model.zero_grad()
    model.training = True
    try:
        loss = model(**batch, labels=labels).loss
    finally:
        model.training = False
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.detach().view(1), torch.cat([flat, flat.norm().view(1)])


def find_stock(model_type, class_name):
    """(class, configuration, stock models); raises NotAsked."""
    cls, reason = getattr(transformers, class_name, None), f"transformers has no {class_name}"
    for key_value_heads in KEY_VALUE_HEADS if cls else ():
        try:
            config = shrink(CONFIG_MAPPING[model_type](), key_value_heads)
            return cls, config, build_stock(cls, config)
        except NotAsked:
            raise
        except Exception as error:
            reason = repr(error)
    raise NotAsked(reason)


def calls_of(model, class_name):
    """{what: (call(model), which positions count)}"""
    if class_name not in modeling_auto.MODEL_MAPPING_NAMES.values():
        calls = {f"generation, {c} cache": ((lambda m, c=c: generate(m, c)), None) for c in ("dynamic", "static")}
        return calls | {"gradient": (gradient, None), "training step": (training_step, None)}
    examples = {f"padding {side}": example(model, side) for side in SIDES}
    return {what: ((lambda m, b=batch: forward(m, b)), kept) for what, (batch, kept) in examples.items()}


def check(model_type, class_name):
    """Compares all that there is; raises NotAsked, Refused or Differs."""
    cls, config, stock = find_stock(model_type, class_name)
    ours, asked = build_ours(cls, config, stock[0].state_dict()), 0
    for what, (call, kept) in calls_of(stock[0], class_name).items():
        try:
            expected = [call(model) for model in stock]
        except Exception:
            continue  # generation that this model does not have
        asked += 1
        for name, model in ours.items():
            actual = call(model)
            differences = [compare(one, actual, kept) for one in expected]
            if all(differences):
                raise Differs(f"{name}, {what}: {differences[0]}")
    if not asked:
        raise NotAsked("no call runs with eager")
    if "tformer_ext" not in ours:
        raise Refused("tformer_ext; the same after replace_modules")


OUTCOMES = {NotAsked: "not asked", Refused: "refused", Differs: "differs"}


def answer(pipe, model_type, class_name):
    """In a process of its own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    tx.huggingface.register()
    linear_cross_entropy._LEAST_LOGITS = linear_cross_entropy._LEAST_CLASSES = 0  # small models take it too
    try:
        check(model_type, class_name)
        pipe.send(("same", ""))
    except (NotAsked, Refused, Differs) as reason:
        pipe.send((OUTCOMES[type(reason)], str(reason)))
    except BaseException:
        pipe.send(("fails", traceback.format_exc()))


CONTEXT = get_context("forkserver")


def ask(job):
    """(outcome, details) of a model type and class."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=answer, args=(theirs, *job))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(SECONDS) else ("no answer", f"in {SECONDS} s")
    except EOFError:
        return "fails", "the process died"
    finally:
        process.kill()
        process.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="all, where none is given")
    chosen = parser.parse_args().model_types
    jobs = []
    for names in (
        modeling_auto.MODEL_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    ):
        jobs += [(t, c) for t, c in names.items() if isinstance(c, str) and (not chosen or t in chosen)]
    CONTEXT.set_forkserver_preload(["__main__", "transformers.modeling_utils", "transformers.generation.utils"])
    os.environ["TRANSFORMERS_VERBOSITY"], os.environ["HF_HUB_OFFLINE"] = "error", "1"
    console, outcomes, reasons = Console(), Counter(), Counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job, (outcome, details) in track(
            zip(jobs, pool.map(ask, jobs), strict=True), total=len(jobs), description="models", console=console
        ):
            outcomes[outcome] += 1
            if outcome == "not asked":
                reasons[details.partition("(")[0]] += 1
            elif outcome != "same":
                console.print(f"{' '.join(job)} {outcome}: {details}", markup=False)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    console.print("not asked:", ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(10)))
    return int(bool(outcomes["differs"] + outcomes["fails"]))


if __name__ == "__main__":
    sys.exit(main())
