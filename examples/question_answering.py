"""Questions about the parameters of functions, answered with a span of their documentation.

"What is the default of rtol?", asked of the section `Parameters` of a function's docstring, is answered by the words
that say it: an encoder with a head for the first and one for the last token of the answer.

The text: docstrings of six installed packages (see docstrings.py) in numpydoc's form, whose parts tell questions and
answers. Nothing is downloaded. A step takes 0.12 s on two cores, 1600 are taken; 75 % of the
answers are exactly right then.
"""

import random
import re
from collections import Counter, namedtuple
from functools import lru_cache

import common
import torch
from common import END, PAD, START, console, pad, shorten, widen
from docstrings import PACKAGES, read_questions
from rich.markup import escape
from simple_transformer import TokenEmbedding
from torch import nn
from torch.nn.functional import cross_entropy

import tformer_ext as tx

LENGTH, HELD_OUT = 160, 200  # tokens of question and text; functions
LONGEST_ANSWER = 30  # tokens

Example = namedtuple("Example", "ids kinds start end offsets")  # start, end: first and last token of the answer


class SpanReader(nn.Module):
    """Logits (B, 2, S) of the answer's first and last token among ids (B, S).

    kinds (B, S) tells tokens apart: 0 of the question, 1 of the text, 2 of the text and in the question too (the "exact
    match" of Chen et al. 2017, "Reading Wikipedia to Answer Open-Domain Questions").
    """

    def __init__(self, modules, vocabulary, d_model, layers, dropout=0.1):
        super().__init__()
        self.embed = TokenEmbedding(vocabulary, d_model, dropout)
        self.kind = nn.Embedding(3, d_model)
        sizes = {"d_model": d_model, "nhead": d_model // 32, "dim_feedforward": 4 * d_model, "dropout": dropout}
        layer = modules.TransformerEncoderLayer(**sizes, batch_first=True, norm_first=True)
        self.encoder = modules.TransformerEncoder(layer, layers, nn.LayerNorm(d_model), enable_nested_tensor=False)
        self.head = nn.Linear(d_model, 2)

    def forward(self, ids, kinds):
        x = self.encoder(self.embed(ids) + self.kind(kinds), src_key_padding_mask=ids == PAD)
        return widen(self.head(x)).mT.masked_fill((kinds == 0)[:, None], -torch.inf)


@lru_cache(maxsize=1)
def tokenize_once(tokenizer, text):
    """Questions about the same text follow each other."""
    return tokenizer.encode(text)


def encode(tokenizer, question):
    """The Example of a Question; None if the answer is not within the first LENGTH tokens or is very long."""
    asked, read = tokenizer.encode(question.words), tokenize_once(tokenizer, question.text)
    ids = [START, *asked.ids, END, *read.ids][:LENGTH]
    before = len(asked.ids) + 2
    name = set(tokenizer.encode(question.words.split()[-1].rstrip("?")).ids)
    kinds = [0] * before + [1 + (token in name) for token in ids[before:]]
    answer = [i for i, (a, b) in enumerate(read.offsets, before) if a < question.span[1] and b > question.span[0]]
    if not answer or answer[-1] >= len(ids) or len(answer) > LONGEST_ANSWER:
        return None
    return Example(ids, kinds, answer[0], answer[-1], [(0, 0)] * before + read.offsets)


def tensors(batch):
    return pad([e.ids for e in batch]), pad([e.kinds for e in batch])


def loss_of(model, batch):
    """Mean of -log p of the answer's first and of its last token."""
    wanted = torch.tensor([(e.start, e.end) for e in batch])
    return cross_entropy(model(*tensors(batch)).flatten(0, 1), wanted.flatten())


@torch.inference_mode()
def answer(model, questions, examples, options):
    """The text of the most probable span (first <= last < first + LONGEST_ANSWER) for each question."""
    answers = []
    for i in range(0, len(examples), 50):
        batch = examples[i : i + 50]
        with common.autocast(options):
            first, last = model(*tensors(batch)).log_softmax(-1).unbind(1)
        spans = (first[:, :, None] + last[:, None, :]).exp().triu().tril(LONGEST_ANSWER - 1)
        best = spans.flatten(1).argmax(1)
        for question, example, index in zip(questions[i : i + 50], batch, best.tolist(), strict=True):
            a, b = divmod(index, spans.shape[2])
            answers.append(question.text[example.offsets[a][0] : example.offsets[b][1]].strip())
    return answers


def overlap(given, wanted):
    """F1 of the words of two answers, as SQuAD defines it."""
    given, wanted = re.findall(r"\w+", given.lower()), re.findall(r"\w+", wanted.lower())
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted)) if common else float(given == wanted)


def show(questions, answers, seen):
    wanted = [question.text[slice(*question.span)].strip() for question in questions]
    for question, right, given in list(zip(questions, wanted, answers, strict=True))[:: len(questions) // 12][:12]:
        console.print(f"[dim]{escape(question.function)}: {escape(shorten(question.text, 150))}[/]")
        mark = "right" if given == right else f"expected: {escape(shorten(right, 100))}"
        console.print(f"  {escape(question.words)}  [bold]{escape(' '.join(given.split()))}[/]  ({mark})\n")
    new = [right not in seen for right in wanted]
    groups = {"all": [True] * len(new), "answers that no training question has": new}
    groups |= {
        kind: [q.words.startswith(kind) for q in questions] for kind in ("What type", "What is the m", "What is the d")
    }
    for name, chosen in groups.items():
        pairs = [(g, w) for g, w, taken in zip(answers, wanted, chosen, strict=True) if taken]
        exact, f1 = (100 * sum(f(g, w) for g, w in pairs) / max(len(pairs), 1) for f in (str.__eq__, overlap))
        console.print(f"{name}: exact match {exact:.1f} %, F1 {f1:.1f} % ({len(pairs)} questions)")


def main(argv=None):
    options = common.parse_options(__doc__, "question_answering", 1600, 60, argv)
    packages = ("networkx", "numpy") if options.quick else tuple(p for p in PACKAGES if p != "stdlib")
    d_model, layers, held_out_size = (64, 1, 20) if options.quick else (128, 3, HELD_OUT)
    functions = list(read_questions(packages))
    random.Random(options.seed).shuffle(functions)
    held_out, functions = functions[:held_out_size], functions[held_out_size:]
    checkpoint = common.Checkpoint(options, d_model=d_model, layers=layers, packages=list(packages))
    tokenizer = checkpoint.tokenizer((asked[0].text for asked in functions), 1000 if options.quick else 4000)

    def examples_of(functions):
        pairs = [(question, encode(tokenizer, question)) for asked in functions for question in asked]
        return zip(*[(question, example) for question, example in pairs if example], strict=True)

    def build(modules):
        return SpanReader(modules, tokenizer.get_vocab_size(), d_model, layers)

    learned, examples = examples_of(functions)
    batches = common.Batches(examples, 32, options.seed, lambda example: len(example.ids))
    model = common.train(build(tx), loss_of, batches, options, checkpoint)
    questions, examples = examples_of(held_out)
    seen = {question.text[slice(*question.span)].strip() for question in learned}
    show(questions, answer(model, questions, examples, options), seen)
    inputs = tensors(batches[0])
    common.compare_speed(build, model, loss_of, batches[0], options, {"inference": lambda model: model(*inputs)})


if __name__ == "__main__":
    main()
