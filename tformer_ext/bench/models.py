"""Whole models of transformers with random weights: stock, with our attention alone, with our modules, and in training
with these but without logits."""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..replacement import replace_modules
from .harness import Contender, Options
from .job import DTYPES, OURS, Job

STOCK = "transformers, sdpa"
ATTENTION = "our attention alone"
NO_LOGITS = "ours, no logits"
NEW_TOKENS = 32


@dataclass(frozen=True)
class Problem:
    """A class of transformers and what its configuration has beside the defaults, on B sequences of S tokens.

    padding: share of the last sequence that is padding.
    """

    name: str
    model: str
    config: dict
    B: int
    S: int
    modes: tuple[str, ...]
    padding: float = 0.0

    def __str__(self) -> str:
        return f"{self.name} B{self.B} S{self.S}" + " padding" * (self.padding > 0)


HALF = {"num_hidden_layers": 6}  # of a model of base size, whose layers are 768 wide
LLAMA = {
    **HALF,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
PROBLEMS = [
    Problem("BERT", "BertModel", HALF, 4, 128, ("training", "eval"), padding=0.5),
    Problem("ModernBERT", "ModernBertModel", HALF, 2, 1024, ("eval",)),
    Problem("GPT-2", "GPT2LMHeadModel", HALF, 2, 512, ("training", "eval")),
    Problem("GPT-2", "GPT2LMHeadModel", HALF, 1, 128, ("generate",)),
    Problem("Llama", "LlamaForCausalLM", LLAMA, 2, 512, ("training", "eval")),
    Problem("Llama", "LlamaForCausalLM", LLAMA, 1, 128, ("generate",)),
]


def jobs() -> Iterator[Job]:
    """None where transformers is not installed. eval is forward without gradients, of a prompt for instance; generate
    a prompt and NEW_TOKENS tokens after it, the likeliest each time."""
    if importlib.util.find_spec("transformers") is None:
        return
    for problem in PROBLEMS:
        for dtype in ("float32", "bfloat16"):
            for mode in problem.modes:
                yield _job(problem, dtype, mode)


def _job(problem: Problem, dtype: str, mode: str) -> Job:
    def contenders(_options: Options) -> list[Contender]:
        return make_contenders(problem, DTYPES[dtype], mode)

    return Job("models", str(problem), dtype, mode, "models", contenders)


def make_contenders(p: Problem, dtype: torch.dtype, mode: str) -> list[Contender]:
    """The same weights and tokens for all; training is forward and backward, with the dropout of the configuration, of
    a language model's loss, or else of the sum of what comes out."""
    import transformers

    from .. import huggingface

    huggingface.register()
    torch.manual_seed(0)
    kind = getattr(transformers, p.model)
    stock = kind(kind.config_class(**p.config, attn_implementation="sdpa")).to(dtype)
    attention, ours = copy.deepcopy(stock), copy.deepcopy(stock)
    for model in (attention, ours):
        model.set_attn_implementation("tformer_ext")
    replace_modules(ours)
    lengths = (p.S * (1 - torch.linspace(0, p.padding, p.B))).round().long()
    batch = {
        "input_ids": torch.randint(1, stock.config.vocab_size, (p.B, p.S)),
        "attention_mask": (torch.arange(p.S) < lengths.view(-1, 1)).long(),
    }
    if mode == "training" and "LM" in p.model:
        batch["labels"] = batch["input_ids"]
    run = {"training": _training, "eval": _eval, "generate": _generate}[mode]
    made = [
        Contender(OURS, run(ours, batch)),
        Contender(STOCK, run(stock, batch)),
        Contender(ATTENTION, run(attention, batch), is_peer=False),
    ]
    if "labels" in batch:
        without = copy.deepcopy(ours)
        replace_modules(without, keep_logits=False)
        made.append(Contender(NO_LOGITS, run(without, batch), is_peer=False))
    for contender in made:  # a call too long to be warmed up is timed once, and a model's first one plans and allocates
        contender.call()
    return made


def _training(model: nn.Module, batch: dict) -> Callable:
    model.train()
    parameters = list(model.parameters())

    def step():
        out = model(**batch)[0]
        return torch.autograd.grad(out, parameters, torch.ones_like(out), allow_unused=True)

    return step


def _eval(model: nn.Module, batch: dict) -> Callable:
    model.eval()

    def run():
        with torch.no_grad():
            return model(**batch)[0]

    return run


def _generate(model: nn.Module, batch: dict) -> Callable:
    model.eval()
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(**batch, **settings)
