"""Which package is this sentence from?

A small Transformer encoder learns to tell, from the prose of a docstring, which of seven packages it documents.

The text: docstrings of the standard library and of six packages that are installed (see docstrings.py); the packages'
own names are struck out. Nothing is downloaded. A step takes 0.16 s on two cores, 800 are
taken; 88 % of the texts are told right then.
"""

import math
import random
import re
from collections import Counter

import common
import torch
from common import END, PAD, console, pad, shorten, widen
from docstrings import PACKAGES, paragraphs, read_docstrings
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy

import tformer_ext as tx

LENGTH, HELD_OUT = 64, 1000
NAMES = re.compile(rf"\b({'|'.join(PACKAGES)}|scikit-learn|scikits?|pyplot|mpl|np|nx|python)\b", re.IGNORECASE)


class PositionalEncoding(nn.Module):
    """dropout(x + sinusoids) of "Attention Is All You Need"; x (B, S, d_model), its first position is `start`."""

    def __init__(self, d_model, dropout=0.1, max_length=512):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        angle = torch.arange(max_length)[:, None] * torch.exp(torch.arange(0, d_model, 2) * (-math.log(1e4) / d_model))
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x, start=0):
        if start + x.shape[1] > len(self.table):
            raise ValueError(f"x: expected at most {len(self.table)} positions, got {start + x.shape[1]}")
        return self.dropout(x + self.table[start : start + x.shape[1]])


class TokenEmbedding(nn.Module):
    """Vectors (B, S, d_model) of token ids (B, S), with their positions."""

    def __init__(self, vocabulary, d_model, dropout):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.position = PositionalEncoding(d_model, dropout)
        # The design that this example grew from took the square root of the vocabulary's size. Here it is d_model's:
        # entries of size 1 / sqrt(d_model), right for the dot products of a head that shares these weights, become
        # as large as the sinusoids, whatever the vocabulary is.
        self.scale = math.sqrt(d_model)

    def forward(self, ids, start=0):
        return self.position(self.embedding(ids) * self.scale, start)


class SimpleTransformer(nn.Module):
    """Logits (B, classes) of token ids (B, S): embedding, encoder stack, mean over the tokens, head.

    modules: torch.nn or tformer_ext; both have the classes used here, with the same arguments and weights.
    """

    def __init__(self, modules, vocabulary, classes, d_model, layers, dropout=0.1):
        super().__init__()
        self.embed = TokenEmbedding(vocabulary, d_model, dropout)
        layer = modules.TransformerEncoderLayer(d_model, d_model // 32, 4 * d_model, dropout, batch_first=True)
        self.encoder = modules.TransformerEncoder(layer, layers)
        self.head = nn.Linear(d_model, classes)

    def forward(self, ids):
        padding = ids == PAD
        x = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        x = x.masked_fill(padding[..., None], 0)
        return self.head(x.sum(1) / (~padding).sum(1, keepdim=True))


def labelled_texts(packages):
    """[(text, class)]: the prose at the beginning of every docstring, and the index of its package."""
    texts = {}
    for docstring in read_docstrings(packages):
        text = " ".join(NAMES.sub("", " ".join(paragraphs(docstring.text))).split()[:LENGTH])
        if len(text.split()) >= 8:
            texts[text] = packages.index(docstring.package)
    return sorted(texts.items())


def loss_of(model, batch):
    return cross_entropy(model(pad([ids for ids, _ in batch])), torch.tensor([label for _, label in batch]))


@torch.inference_mode()
def predict(model, rows, options):
    """The probabilities (len(rows), classes)."""
    with common.autocast(options):
        return torch.cat([widen(model(pad(rows[i : i + 100]))).softmax(-1) for i in range(0, len(rows), 100)])


def show(texts, labels, probabilities, packages):
    predicted = probabilities.argmax(-1)
    right = predicted == torch.tensor(labels)
    majority = Counter(labels).most_common(1)[0][1] / len(labels)
    table = Table(title=f"{len(labels)} docstrings that were held out")
    for column in ("package", "docstrings", "found", "most often taken for"):
        table.add_column(column)
    for label, package in enumerate(packages):
        of_it = torch.tensor(labels) == label
        wrong = Counter(predicted[of_it & ~right].tolist()).most_common(1)
        other = packages[wrong[0][0]] if wrong else ""
        table.add_row(package, str(int(of_it.sum())), f"{100 * right[of_it].float().mean():.0f} %", other)
    console.print(table)
    for i in range(8):
        mark = "right" if right[i] else f"wrong, it is {packages[labels[i]]}"
        console.print(f"  {escape(shorten(texts[i], 150))}\n    [bold]{packages[predicted[i]]}[/] ({mark})")
    console.print(f"accuracy {100 * right.float().mean():.1f} %; always the largest package: {100 * majority:.1f} %")


def main(argv=None):
    options = common.parse_options(
        __doc__, "simple_transformer", 800, 60, argv, text="sentences to sort, after the training"
    )
    packages = ("networkx", "numpy") if options.quick else PACKAGES
    d_model, layers, held_out = (64, 1, 100) if options.quick else (128, 3, HELD_OUT)
    examples = labelled_texts(packages)
    random.Random(options.seed).shuffle(examples)
    checkpoint = common.Checkpoint(options, d_model=d_model, layers=layers, packages=list(packages))
    tokenizer = checkpoint.tokenizer((text for text, _ in examples[held_out:]), 1000 if options.quick else 4000)

    def encode(text):
        return tokenizer.encode(text).ids[: 2 * LENGTH] or [END]

    def build(modules):
        return SimpleTransformer(modules, tokenizer.get_vocab_size(), len(packages), d_model, layers)

    batches = common.Batches(
        [(encode(text), label) for text, label in examples[held_out:]], 64, options.seed, lambda e: len(e[0])
    )
    model = common.train(build(tx), loss_of, batches, options, checkpoint)
    texts, labels = zip(*examples[:held_out], strict=True)
    show(texts, labels, predict(model, [encode(text) for text in texts], options), packages)
    if options.text:
        for text, p in zip(options.text, predict(model, [encode(text) for text in options.text], options), strict=True):
            console.print(f"{escape(text)}\n    [bold]{packages[p.argmax()]}[/] ({100 * p.max():.0f} %)")
    batch = pad([ids for ids, _ in batches[0]])
    common.compare_speed(build, model, loss_of, batches[0], options, {"inference": lambda m: m(batch)})


if __name__ == "__main__":
    main()
