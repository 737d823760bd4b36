"""Training of a small Transformer that predicts the next character, built of stock modules and of ours."""

import time
from dataclasses import dataclass, field
from statistics import median

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy

import tformer_ext as tx

from .text import characters

LENGTH, BATCH, WIDTH, HEADS, LAYERS, DROPOUT = 256, 8, 128, 4, 2, 0.1


@dataclass
class Run:
    """Loss in nats per character and milliseconds of every step."""

    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)


class StockResidualLayerNorm(nn.LayerNorm):
    """What tx.ResidualLayerNorm does, in PyTorch's operations."""

    def __init__(self, width, dropout):
        super().__init__(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, residual):
        return super().forward(residual + self.dropout(x))


class Block(nn.Module):
    """A post-norm Transformer layer from the given two modules."""

    def __init__(self, attention, residual_norm):
        super().__init__()
        self.attention = attention(WIDTH, HEADS, dropout=DROPOUT, batch_first=True)
        self.norm1 = residual_norm(WIDTH, dropout=DROPOUT)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm2 = residual_norm(WIDTH, dropout=DROPOUT)

    def forward(self, x, mask):
        attended, _ = self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
        x = self.norm1(attended, x)
        return self.norm2(self.feed_forward(x), x)


class LanguageModel(nn.Module):
    """Logits (B, S, 128) of the characters that follow ids (B, S)."""

    def __init__(self, attention, residual_norm):
        super().__init__()
        self.embedding = nn.Embedding(128, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block(attention, residual_norm) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 128)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, ids):
        x = self.embedding(ids) + self.position
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(x)


def run(console: Console, steps: int) -> dict[str, Run]:
    """Trains both on the same batches from the same weights, step by step in turn; prints the comparison."""
    console.rule("Training a small Transformer")
    torch.manual_seed(0)
    models = {
        "stock": LanguageModel(nn.MultiheadAttention, StockResidualLayerNorm),
        "tformer_ext": LanguageModel(tx.MultiheadAttention, tx.ResidualLayerNorm),
    }
    models["tformer_ext"].load_state_dict(models["stock"].state_dict())
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3) for name, model in models.items()}
    runs = {name: Run() for name in models}
    text = torch.frombuffer(bytearray(characters()), dtype=torch.uint8)
    count = sum(p.numel() for p in models["stock"].parameters())
    console.print(f"{len(text)} characters, {count} parameters, dropout {DROPOUT}, {steps} steps", highlight=False)
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.percentage:3.0f} % {task.fields[losses]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=steps, losses="")
        for n in range(steps):
            starts = torch.randint(len(text) - LENGTH - 1, (BATCH,))
            batch = torch.stack([text[s : s + LENGTH + 1] for s in starts.tolist()]).long()
            for name in list(models)[:: 1 - 2 * (n % 2)]:
                train_step(models[name], optimizers[name], batch, runs[name])
            losses = "  ".join(f"{name} {r.losses[-1]:.3f}" for name, r in runs.items())
            progress.update(task, advance=1, losses=f"loss {losses}")
    print_runs(console, runs)
    return runs


def train_step(model, optimizer, batch, record: Run) -> None:
    """One step on batch (B, LENGTH + 1); records its loss and its time."""
    start = time.perf_counter()
    loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    record.milliseconds.append(1e3 * (time.perf_counter() - start))
    record.losses.append(loss.item())


def print_runs(console: Console, runs: dict[str, Run]) -> None:
    columns = ("modules", "first loss", "half way", "last 10", "milliseconds a step", "against tformer_ext")
    table = Table(*columns, title="the same batches, each model with its own dropout", title_justify="left")
    ours = median(runs["tformer_ext"].milliseconds)
    for name, record in runs.items():
        middle, step = len(record.losses) // 2, median(record.milliseconds)
        last = sum(record.losses[-10:]) / len(record.losses[-10:])
        row = (record.losses[0], record.losses[middle], last)
        table.add_row(name, *(f"{loss:.3f}" for loss in row), f"{step:.1f}", f"x {step / ours:.2f}")
    console.print(table)
