"""One-line summaries of documentation, written by an encoder-decoder that may copy words from the text.

The text: docstrings of the standard library and of six installed packages (see docstrings.py). Their first sentence is
a summary that a person wrote; the model sees the name of the function or class and what follows the summary. Nothing is
downloaded. A step takes 0.32 s on one core, 1200 are taken.
"""

import random

import common
from common import console, pad, shorten
from docstrings import PACKAGES, read_docstrings, summary_and_rest
from rich.markup import escape
from rouge_score.rouge_scorer import RougeScorer
from seq2seq import Seq2Seq, loss_of, search, search_all

import tformer_ext as tx

LENGTH, HELD_OUT = 64, 200  # tokens of a text; documents


def read_documents(packages):
    """Sorted [(text, summary)], each summary once: the same sentence over several functions would leak."""
    found = filter(None, map(summary_and_rest, read_docstrings(packages)))
    return sorted({summary: (text, summary) for summary, text in found}.values())


def summarize(model, tokenizer, texts, options, beams):
    rows = [tokenizer.encode(text).ids[:LENGTH] for text in texts]
    with common.autocast(options):
        return [tokenizer.decode(ids).strip() for ids in search_all(model, rows, beams=beams, max_length=32)]


def show(held_out, greedy, beam):
    for (text, summary), output in list(zip(held_out, beam, strict=True))[:12]:
        console.print(
            f"[dim]{escape(shorten(text, 220))}[/]\n  human: {escape(summary)}\n  model: [bold]{escape(output)}\n"
        )
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    first_words = [" ".join(text.partition(": ")[2].split()[:10]) for text, _ in held_out]
    names = [text.partition(": ")[0] for text, _ in held_out]
    outputs = {"greedy": greedy, "beam search": beam, "the name alone": names, "the text's first 10 words": first_words}
    for name, lines in outputs.items():
        scores = [scorer.score(summary, line) for (_, summary), line in zip(held_out, lines, strict=True)]
        mean = {
            kind: 100 * sum(score[kind].fmeasure for score in scores) / len(scores) for kind in ("rouge1", "rougeL")
        }
        console.print(f"{name}: ROUGE-1 {mean['rouge1']:.1f}, ROUGE-L {mean['rougeL']:.1f} ({len(scores)} documents)")


def main(argv=None):
    options = common.parse_options(__doc__, "summarization", 1200, 40, argv)
    packages = ("networkx", "numpy") if options.quick else PACKAGES
    d_model, layers, held_out_size = (64, 1, 40) if options.quick else (192, 2, HELD_OUT)
    documents = read_documents(packages)
    random.Random(options.seed).shuffle(documents)
    held_out, documents = documents[:held_out_size], documents[held_out_size:]
    checkpoint = common.Checkpoint(options, d_model=d_model, layers=layers, packages=list(packages))
    tokenizer = checkpoint.tokenizer((text for pair in documents for text in pair), 1000 if options.quick else 4000)
    examples = [(tokenizer.encode(text).ids[:LENGTH], tokenizer.encode(summary).ids) for text, summary in documents]

    def build(modules):
        return Seq2Seq(modules, tokenizer.get_vocab_size(), d_model, layers)

    batches = common.Batches(examples, 32, options.seed, lambda pair: sum(map(len, pair)))
    model = common.train(build(tx), loss_of, batches, options, checkpoint)
    texts = [text for text, _ in held_out]
    show(held_out, *(summarize(model, tokenizer, texts, options, beams) for beams in (1, 4)))
    source = pad([source for source, _ in batches[0]])
    uses = {"greedy search (tformer_ext: with cache)": lambda model: search(model, source, max_length=32)}
    common.compare_speed(build, model, loss_of, batches[0], options, uses)


if __name__ == "__main__":
    main()
