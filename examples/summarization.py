"""One-line summaries of documentation, written by an encoder-decoder that may copy words from the text.

The text: docstrings of the standard library and of six installed packages (see docstrings.py). Their first sentence is
a summary that a person wrote; the model sees the names of the class and the function and what follows the summary.
Nothing is downloaded. A step takes 0.19 s on two cores, 2000 are taken; ROUGE-1 is 41
then, that of the name and the first words of the text 29.
"""

import random
import re

import common
from common import PAD, START, UNKNOWN, console, pad, shorten
from docstrings import PACKAGES, read_docstrings, summary_and_rest
from rich.markup import escape
from rouge_score.rouge_scorer import RougeScorer
from seq2seq import Seq2Seq, loss_of, search, search_all

import tformer_ext as tx

LENGTH, HELD_OUT = 64, 500  # words of a text; documents
SEARCH = {"max_length": 32, "forbidden": (PAD, START, UNKNOWN), "repeat": False}


def read_documents(packages):
    """Sorted [(text, summary)]; a summary or a text that occurs twice, but for case and signs, is taken once."""
    seen, found = set(), []
    for summary, text in sorted(filter(None, map(summary_and_rest, read_docstrings(packages)))):
        keys = {re.sub(r"\W+", " ", part.lower()).strip() for part in (summary, text.partition(": ")[2])}
        if not keys & seen:
            found.append((text, summary))
        seen |= keys
    return found


class Words:
    """Texts as ids and back. A word that the vocabulary lacks has an id beyond it, which holds for one text only."""

    def __init__(self, tokenizer):
        self.tokenizer, self.size = tokenizer, tokenizer.get_vocab_size()

    def encode(self, text):
        """(ids of the first LENGTH words, those of them that the vocabulary lacks)."""
        encoding = self.tokenizer.encode(text)
        pairs = [(i, text[slice(*span)]) for i, span in zip(encoding.ids, encoding.offsets, strict=True)][:LENGTH]
        own = list(dict.fromkeys(word for i, word in pairs if i == UNKNOWN))
        return [self.size + own.index(word) if i == UNKNOWN else i for i, word in pairs], own

    def encode_summary(self, summary, own):
        """The ids, with those of a text's own words."""
        first, *rest = summary.split(" ", 1)
        encoding = self.tokenizer.encode(summary := " ".join([first.lower() if first.istitle() else first, *rest]))
        words = [summary[slice(*span)] for span in encoding.offsets]
        pairs = zip(encoding.ids, words, strict=True)
        return [self.size + own.index(word) if i == UNKNOWN and word in own else i for i, word in pairs]

    def decode(self, ids, own):
        words = [own[i - self.size] if i >= self.size else self.tokenizer.id_to_token(i) for i in ids]
        text = re.sub(r" (?=[.,;:!?)\]])|(?<=[(\[]) ", "", " ".join(words))
        return text[:1].upper() + text[1:]


def summarize(model, words, texts, options, beams):
    ids, own = zip(*map(words.encode, texts), strict=True)
    with common.autocast(options):
        return list(map(words.decode, search_all(model, ids, beams=beams, **SEARCH), own))


def show(held_out, greedy, beam):
    for (text, summary), output in list(zip(held_out, beam, strict=True))[:12]:
        console.print(
            f"[dim]{escape(shorten(text, 220))}[/]\n  human: {escape(summary)}\n  model: [bold]{escape(output)}\n"
        )
    names, texts = zip(*[text.split(": ", 1) for text, _ in held_out], strict=True)
    begins = [" ".join(text.split()[:10]) for text in texts]
    outputs = {
        "greedy": greedy,
        "beam search": beam,
        "the name alone": [name.split(", ")[-1] for name in names],
        "the names of class and function": names,
        "the text's first 10 words": begins,
        "names and first 10 words": list(map(" ".join, zip(names, begins, strict=True))),
    }
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for name, lines in outputs.items():
        scores = [scorer.score(summary, line) for (_, summary), line in zip(held_out, lines, strict=True)]
        one, longest = (100 * sum(s[kind].fmeasure for s in scores) / len(scores) for kind in ("rouge1", "rougeL"))
        console.print(f"{name}: ROUGE-1 {one:.1f}, ROUGE-L {longest:.1f} ({len(scores)} documents)")


def main(argv=None):
    options = common.parse_options(__doc__, "summarization", 2000, 40, argv)
    packages = ("networkx", "numpy") if options.quick else PACKAGES
    d_model, layers, held_out_size = (64, 1, 40) if options.quick else (192, 2, HELD_OUT)
    documents = read_documents(packages)
    random.Random(options.seed).shuffle(documents)
    held_out, documents = documents[:held_out_size], documents[held_out_size:]
    checkpoint = common.Checkpoint(options, d_model=d_model, layers=layers, packages=list(packages))
    size = 1000 if options.quick else 5000
    words = Words(checkpoint.tokenizer((text for pair in documents for text in pair), size, common.train_words))
    examples = []
    for text, summary in documents:
        ids, own = words.encode(text)
        examples.append((ids, words.encode_summary(summary, own)))

    def build(modules):
        return Seq2Seq(modules, words.size, d_model, layers)

    batches = common.Batches(examples, 32, options.seed, lambda pair: sum(map(len, pair)))
    model = common.train(build(tx), loss_of, batches, options, checkpoint)
    texts = [text for text, _ in held_out]
    show(held_out, *(summarize(model, words, texts, options, beams) for beams in (1, 4)))
    source = pad([source for source, _ in batches[0]])
    uses = {"greedy search (tformer_ext: with cache)": lambda model: search(model, source, **SEARCH)}
    common.compare_speed(build, model, loss_of, batches[0], options, uses)


if __name__ == "__main__":
    main()
