"""The applications under examples/: what they read, their models and search, and each of them run in short."""

import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tformer_ext as tx

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"
SCRIPTS = ("simple_transformer", "translation", "summarization", "question_answering")

if not FOLDER.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
for needed in ("rich", "tokenizers", "sacrebleu", "rouge_score", "gramps"):
    pytest.importorskip(needed)
sys.path.insert(0, str(FOLDER))
common, docstrings, seq2seq, simple_transformer, translation, summarization, question_answering = (
    importlib.import_module(name) for name in ("common", "docstrings", "seq2seq", *SCRIPTS)
)

NUMPYDOC = """Add some numbers together.

A longer :func:`text <sum>` with ``code`` and *stress*, so that there are
more than twelve words in the end.

Parameters
----------
first : array_like
    The first number. It may
    be an array.
second : {int, float}, default=3
    The second number,
    which has no full stop

Returns
-------
out : ndarray
    The sum.
"""


def options(**changed):
    return SimpleNamespace(**{"dtype": "float32", "seed": 0, "quick": True, "steps": 6, "task": "test"} | changed)


def tiny(modules=tx, vocabulary=6, seed=0):
    """A Seq2Seq in float64 whose weights are large enough for its probabilities to differ clearly."""
    torch.manual_seed(seed)
    model = seq2seq.Seq2Seq(modules, vocabulary, 32, 2, dropout=0.0).double().eval()
    with torch.no_grad():
        model.embed.embedding.weight.mul_(2)
    return model


# What is read


def test_parameters_are_found_with_their_spans():
    text, (first, second) = docstrings.parameters(NUMPYDOC)
    assert (first.name, text[slice(*first.type)]) == ("first", "array_like")
    assert text[slice(*first.meaning)] == "The first number."
    assert text[slice(*second.type)] == "{int, float}, default=3"
    assert text[slice(*second.meaning)] == "The second number,\nwhich has no full stop"
    assert "out" not in text and "Returns" not in text
    assert docstrings.parameters("No section.") == ("", [])


def test_summary_and_rest():
    summary, rest = docstrings.summary_and_rest(docstrings.Docstring("p", "addSomeNumbers", NUMPYDOC))
    assert summary == "Add some numbers together."
    assert rest.startswith("add some numbers: A longer text with code and stress, so that there are more than")
    assert "---" not in rest and "`" not in rest
    assert docstrings.summary_and_rest(docstrings.Docstring("p", "f", "Add some numbers.")) is None
    _, rest = docstrings.summary_and_rest(docstrings.Docstring("p", "add", NUMPYDOC, "RingOfNumbers"))
    assert rest.startswith("ring of numbers, add: A longer text")


def test_no_summary_and_no_text_occurs_twice(monkeypatch):
    changed = NUMPYDOC.replace("numbers together.", "Numbers, together.")  # the same summary but for case and signs
    same_text = NUMPYDOC.replace("Add some numbers together.", "Add up what is given.")
    new = changed.replace("Add", "Multiply").replace("longer", "quite different")
    read = [docstrings.Docstring("p", f"f{i}", text) for i, text in enumerate((NUMPYDOC, changed, same_text, new))]
    monkeypatch.setattr(summarization, "read_docstrings", lambda packages: read)
    summaries = [summary for _, summary in summarization.read_documents(["p"])]
    assert len(summaries) == 2 and summaries[1] == "Multiply some Numbers, together."


def test_words_that_the_vocabulary_lacks_come_from_the_text():
    text, summary = (
        "add up: Values of add_up (a fused-add), in all, of Zed.",
        "Sum the values with add_up (fused-add) or Qux.",
    )
    words = summarization.Words(common.train_words(["sum values the with of all or ( ) , . :"], 100))
    ids, own = words.encode(text)
    assert own == ["add", "up", "Values", "add_up", "a", "fused-add", "in", "Zed"] and max(ids) == words.size + 7
    assert words.decode(ids, own) == "Add up: Values of add_up (a fused-add), in all, of Zed."
    wanted = words.encode_summary(summary, own)
    assert wanted.count(common.UNKNOWN) == 1  # Qux, which is neither here nor there
    assert words.decode(wanted, own) == "Sum the values with add_up (fused-add) or <unknown>."


def test_docstrings_are_read_without_running_anything(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text('def f():\n    """Of a test."""\n')
    (tmp_path / "a.py").write_text(
        'raise ValueError\nclass A:\n    """Text."""\n    def f(self):\n        """Text."""\n'
    )
    (tmp_path / "b.py").write_text("not Python {{ at all")
    (tmp_path / "c.py").write_text('async def g():\n    """More\n\n    text."""\n')
    monkeypatch.setattr(docstrings, "package_folder", lambda package: tmp_path)
    assert list(docstrings.read_docstrings(["p"])) == [("p", "A", "Text.", ""), ("p", "g", "More\n\ntext.", "")]


def test_missing_packages_are_named(monkeypatch):
    with pytest.raises(SystemExit, match=r"no_such_package is not installed: pip install .*examples"):
        list(docstrings.read_docstrings(["no_such_package"]))
    with pytest.raises(SystemExit, match="no_such_package is not installed"):
        translation.read_catalogue(package="no_such_package")
    with pytest.raises(SystemExit, match="no catalogue for xx"):
        translation.read_catalogue("xx")


def test_catalogue_holds_short_pairs():
    pairs = dict(translation.read_catalogue())
    assert len(pairs) > 5000
    assert pairs["Father"] == "Père" and pairs["Mother"] == "Mère"
    assert all(1 <= len(english.split()) <= translation.LONGEST and french for english, french in pairs.items())
    assert not any("\x04" in english or "_" in english for english in pairs)


def test_held_out_phrases_are_not_trained_on():
    pairs = [(f"word {i // 2}{':' * (i % 2)}", str(i)) for i in range(40)]
    held_out, rest = translation.split(pairs, 5, seed=1)
    assert len(held_out) == 5 and held_out != translation.split(pairs, 5, seed=2)[0]
    bare = {english.rstrip(":") for english, _ in held_out}
    assert sorted(rest) == sorted(pair for pair in pairs if pair[0].rstrip(":") not in bare)


def test_questions_have_answers_in_their_text(monkeypatch):
    read = [docstrings.Docstring("p", "add", NUMPYDOC)]
    monkeypatch.setattr(docstrings, "read_docstrings", lambda packages: read)
    (questions,) = docstrings.read_questions(["p"])
    answers = {question.words: question.text[slice(*question.span)] for question in questions}
    assert answers["What type has first?"] == "array_like"
    assert answers["What is the default of second?"] == "3"
    assert answers["What is the meaning of first?"] == "The first number."
    monkeypatch.setattr(docstrings, "LENGTH_OF_PART", 60)  # now each parameter is a part of its own
    (in_parts,) = docstrings.read_questions(["p"])
    assert {question.words: question.text[slice(*question.span)] for question in in_parts} == answers
    assert len({question.text for question in in_parts}) == 2

    tokenizer = common.train_tokenizer([NUMPYDOC], 300)
    for question in questions:
        example = question_answering.encode(tokenizer, question)
        begin, end = example.offsets[example.start][0], example.offsets[example.end][1]
        assert question.text[begin:end].strip() == question.text[slice(*question.span)]
        assert len(example.ids) == len(example.kinds) <= question_answering.LENGTH
    monkeypatch.setattr(question_answering, "LENGTH", 20)
    assert question_answering.encode(tokenizer, questions[-1]) is None


def test_overlap_is_the_f1_of_words():
    assert question_answering.overlap("a list of int", "a list") == pytest.approx(2 * 2 / (4 + 2))
    assert question_answering.overlap("int", "float") == 0
    assert question_answering.overlap("Int.", "int") == 1


def test_tokenizer_spells_any_text():
    tokenizer = common.train_tokenizer(["some text"], 300)
    for text in ("some text", "Évènement n° 12 %s", "数"):
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text
    assert tokenizer.get_vocab()["<pad>"] == common.PAD and tokenizer.get_vocab()["<end>"] == common.END


# Models and search


def test_positions_are_sinusoids_and_the_embedding_is_scaled_by_the_width():
    embed = simple_transformer.TokenEmbedding(7, 16, dropout=0.0)
    ids = torch.tensor([[3, 4, 3]])
    position, pair = torch.meshgrid(torch.arange(3.0), torch.arange(8.0), indexing="ij")
    angle = position / 10000 ** (2 * pair / 16)
    expected = torch.empty(1, 3, 16)
    expected[..., 0::2], expected[..., 1::2] = angle.sin(), angle.cos()
    assert_close(embed(ids), expected + 4 * embed.embedding.weight[ids])  # 4 = sqrt(16)
    assert_close(embed(ids[:, 2:], start=2), embed(ids)[:, 2:])
    with pytest.raises(ValueError, match="x: expected at most 512 positions, got 513"):
        embed(ids, start=510)
    assert (embed.position.train().dropout.p, simple_transformer.PositionalEncoding(16, 0.3).dropout.p) == (0.0, 0.3)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("modules", [nn, tx], ids=["torch.nn", "tformer_ext"])
def test_padding_changes_nothing(modules):
    short, long = [3, 4], [5, 3, 4, 5]
    classifier = simple_transformer.SimpleTransformer(modules, 6, 3, 64, 2).double().eval()
    with torch.no_grad():
        assert_close(classifier(common.pad([short, long]))[:1], classifier(common.pad([short])))
        reader = question_answering.SpanReader(modules, 6, 32, 2).double().eval()
        together = reader(common.pad([short, long]), torch.tensor([[0, 1, 0, 0], [0, 1, 2, 1]]))
        assert_close(together[:1, :, :2], reader(common.pad([short]), torch.tensor([[0, 1]])))
        assert together[0, :, [0, 2, 3]].isneginf().all() and together[1, :, 1:].isfinite().all()
        model = tiny(modules)
        source, target = common.pad([short, long]), common.pad([[1, 3], [1, 4]])
        both = model.decode(target, model.encode(source), source)
        alone = model.decode(target[:1], model.encode(source[:1, :2]), source[:1, :2])
        assert_close(both[:1], alone)


def test_decoder_sees_no_later_token_and_gives_probabilities():
    model, source = tiny(), torch.tensor([[3, 4, 5]])
    a, b = (model.decode(torch.tensor([[1, 3, last]]), model.encode(source), source) for last in (4, 5))
    assert_close(a[:, :2], b[:, :2])
    assert not torch.allclose(a[:, 2], b[:, 2])
    assert_close(a.exp().sum(-1), torch.ones(1, 3, dtype=torch.float64))


def test_copying_takes_tokens_of_the_source_only():
    model, source = tiny(), torch.tensor([[3, 5, 0]])
    nn.init.constant_(model.copy_gate.bias, -1e9)
    p = model.decode(torch.tensor([[1, 3]]), model.encode(source), source).exp()
    assert_close(p[..., [3, 5]].sum(-1), torch.ones(1, 2, dtype=torch.float64))
    assert (p[..., 3] > 1e-3).all() and (p[..., 5] > 1e-3).all()


def test_both_kinds_of_modules_agree():
    ours, stock = tiny(tx), tiny(nn, seed=1)
    stock.load_state_dict(ours.state_dict())
    source, target = torch.tensor([[3, 4, 5, 0], [5, 5, 3, 4]]), torch.tensor([[1, 3, 3], [1, 4, 5]])
    with torch.no_grad():
        assert_close(*(model.decode(target, model.encode(source), source) for model in (ours, stock)))


@torch.no_grad()
def test_decoding_with_a_cache_is_decoding_at_once():
    model = tiny()
    source, target = torch.tensor([[3, 4, 5, 0], [5, 5, 3, 4]]), torch.tensor([[1, 3, 3, 4], [1, 4, 5, 3]])
    memory, cache = model.encode(source), model.new_cache()
    parts = [model.decode(part, memory, source, cache) for part in (target[:, :1], target[:, 1:3], target[:, 3:])]
    assert cache.length == 4
    assert_close(torch.cat(parts, 1), model.decode(target, memory, source))


def every_output(model, source, max_length):
    """{output: log-probability}, an output being the tokens 3, 4 ... up to END or to max_length of them."""
    found = {}
    with torch.no_grad():
        memory = model.encode(source)
        for length in range(max_length + 1):
            for words in itertools.product(range(3, model.embed.embedding.num_embeddings), repeat=length):
                tokens = [*words, seq2seq.END][:max_length]
                log_p = model.decode(torch.tensor([[seq2seq.START, *tokens[:-1]]]), memory, source)[0]
                found[words] = (sum(log_p[i, token].item() for i, token in enumerate(tokens)), len(tokens))
    return found


@pytest.mark.parametrize("modules", [nn, tx], ids=["torch.nn", "tformer_ext"])
@pytest.mark.parametrize("seed", range(3))
def test_wide_beam_search_is_exhaustive_search(modules, seed):
    model = tiny(modules, seed=seed)
    source = torch.tensor([[3, 4, 5], [5, 3, 0]])
    for power in (0.0, 0.7):
        expected = []
        for row in source:
            found = every_output(model, row[None], max_length=3)
            expected.append(list(max(found, key=lambda words: found[words][0] / found[words][1] ** power)))
        assert seq2seq.search(model, source, beams=64, max_length=3, length_power=power) == expected


@torch.no_grad()
@pytest.mark.parametrize("modules", [nn, tx], ids=["torch.nn", "tformer_ext"])
def test_one_beam_takes_the_likeliest_token_each_time(modules):
    model = tiny(modules)
    source = torch.tensor([[3, 4, 5], [5, 3, 0]])
    expected = []
    for row in source:
        tokens = [seq2seq.START]
        while len(tokens) < 9 and tokens[-1] != seq2seq.END:
            log_p = model.decode(torch.tensor([tokens]), model.encode(row[None]), row[None])[0, -1]
            tokens.append(max(range(2, 6), key=lambda token: log_p[token].item()))
        expected.append([token for token in tokens[1:] if token != seq2seq.END])
    assert seq2seq.search(model, source, max_length=8) == expected
    assert seq2seq.search_all(model, [[3, 4, 5], [5, 3]], max_length=8) == expected
    assert seq2seq.search_all(model, []) == []


def test_search_keeps_to_what_is_allowed():
    model, source = tiny(), torch.tensor([[3, 4, 5], [5, 3, 0]])
    for beams in (1, 4):
        found = seq2seq.search(
            model, source, beams, max_length=12, forbidden=(common.PAD, common.START, 4), repeat=False
        )
        for output in found:
            triples = list(itertools.pairwise(itertools.pairwise(output)))
            assert 4 not in output and len(triples) == len(set(triples))


def test_copying_a_word_that_the_vocabulary_lacks_is_learned():
    torch.manual_seed(0)
    model, generator = seq2seq.Seq2Seq(tx, 12, 32, 1, dropout=0.0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    def example():  # the output is the one word of the source beyond the 12, and then 5
        source = torch.randint(4, 12, (6,), generator=generator).tolist()
        place, own = torch.randint(6, (2,), generator=generator).tolist()
        source[place] = 12 + own
        return source, [12 + own, 5]

    losses = [
        common.training_step(model, seq2seq.loss_of, [example() for _ in range(32)], optimizer, options())
        for _ in range(150)
    ]
    assert losses[-1] < 0.1 < losses[0]
    sources, targets = zip(*[example() for _ in range(40)], strict=True)
    outputs = seq2seq.search_all(model.eval(), sources, beams=2, max_length=4)
    assert sum(map(list.__eq__, outputs, targets)) >= 38


def test_an_empty_phrase_is_translated_too():
    tokenizer = common.train_tokenizer(["some text"], 300)
    (output,) = translation.translate(tiny(vocabulary=tokenizer.get_vocab_size()), tokenizer, [""], options(), beams=2)
    assert isinstance(output, str)


def test_the_answer_is_the_likeliest_span_that_is_one():
    first, last = torch.full((2, 1, 6), -9.0)
    first[0, 4], last[0, 2] = 5.0, 5.0  # each the likeliest, but the last comes before the first
    first[0, 1], last[0, 5] = 4.0, 3.0

    def model(ids, kinds):
        return torch.stack([first, last], dim=1)

    question = docstrings.Question("f", "?", "a b c d e f", (0, 1))
    example = question_answering.Example([9] * 6, [1] * 6, 0, 0, [(i, i + 1) for i in range(0, 12, 2)])
    assert question_answering.answer(model, [question], [example], options()) == ["b c"]


# Training


def test_batches_hold_every_example_once_per_epoch():
    examples = [[i] * (i % 7 + 1) for i in range(23)]
    batches = common.Batches(examples, 5, seed=0)
    epochs = [[batches[step] for step in range(first, first + 5)] for first in (0, 5)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == sorted(examples)
    assert epochs[0] != epochs[1]
    again = common.Batches(examples, 5, seed=0)
    assert [again[step] for step in (7, 2)] == [epochs[1][2], epochs[0][2]]
    assert [common.Batches(examples, 5, seed=1)[step] for step in range(5)] != epochs[0]


def test_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SAVE_EVERY", 2)
    pairs = [([3, 4, 5][: i % 3 + 1], [5, 4]) for i in range(8)]

    def run(path, fail_at=None):
        chosen = options(checkpoint=path)
        torch.manual_seed(0)
        model = seq2seq.Seq2Seq(tx, 6, 32, 1, dropout=0.1)
        calls = itertools.count()

        def loss_of(model, batch):
            if next(calls) == fail_at:
                raise KeyboardInterrupt
            return seq2seq.loss_of(model, batch)

        common.train(
            model, loss_of, common.Batches(pairs, 4, 0, lambda e: len(e[0])), chosen, common.Checkpoint(chosen)
        )
        return model.state_dict()

    expected = run(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part.pt", fail_at=3)
    assert common.Checkpoint(options(checkpoint=tmp_path / "part.pt")).step == 2
    resumed = run(tmp_path / "part.pt")
    for name, weight in expected.items():
        assert torch.equal(weight, resumed[name]), name


def test_checkpoints_of_something_else_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    common.Checkpoint(options(checkpoint=path), d_model=32).save(step=1)
    assert common.Checkpoint(options(checkpoint=path), d_model=32).step == 1
    with pytest.raises(SystemExit, match=r"x\.pt was made with .*'d_model': 32.* asks for .*'d_model': 64"):
        common.Checkpoint(options(checkpoint=path), d_model=64)
    path.write_text("no checkpoint")
    with pytest.raises(SystemExit, match=r"x\.pt is not a checkpoint"):
        common.Checkpoint(options(checkpoint=path), d_model=32)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps: expected a number above 0, got 0"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--checkpoint", "no/such/folder/x.pt"], "--checkpoint: expected a file in a folder that exists"),
    ],
)
def test_bad_arguments_are_named(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        importlib.import_module(script).main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


# What is shown


def test_figures_are_those_of_the_outputs(capsys):
    pairs = [("chat", "Le chat dort ici."), ("tree", "Un arbre.")]
    translation.show(pairs, ["Le chat dort ici.", "Un arbre."], ["Le chat dort ici.", "..."])
    documents = [("cat, sleep: It is a cat.", "Sleep."), ("dog, bark: Of dogs.", "Make a noise.")]
    summarization.show(documents, ["Sleep.", "Make a noise."], ["Sleep.", "Bark."])
    probabilities = torch.tensor([[0.9, 0.1]] * 8 + [[0.2, 0.8]] * 2)
    simple_transformer.show(["a text"] * 10, [0] * 6 + [1] * 4, probabilities, ("numpy", "scipy"))
    questions = [
        docstrings.Question("f", "What type has a?", "a : int, b : big int", span) for span in [(4, 7), (13, 20)]
    ]
    question_answering.show(questions * 12, ["int", "int"] * 12, {"int"})
    printed = capsys.readouterr().out
    for expected in (
        "greedy: chrF 100.0, 100 % the same as the reference (2 phrases)",
        ", 50 % the same as the reference (2 phrases)",
        "greedy: ROUGE-1 100.0, ROUGE-L 100.0 (2 documents)",
        "beam search: ROUGE-1 50.0, ROUGE-L 50.0 (2 documents)",
        "the name alone: ROUGE-1 50.0, ROUGE-L 50.0 (2 documents)",
        "the names of class and function: ROUGE-1 33.3, ROUGE-L 33.3 (2 documents)",
        "accuracy 80.0 %; always the largest package: 60.0 %",
        "all: exact match 50.0 %, F1 83.3 % (24 questions)",
        "answers that no training question has: exact match 0.0 %, F1 66.7 % (12 questions)",
    ):
        assert expected in printed, expected


# The scripts as a whole

PROMISED = {
    "simple_transformer": ["docstrings that were held out", "accuracy", "numpy", "inference", "Find the shortest path"],
    "translation": ["reference", "chrF", "beam search", "greedy search", "Find the shortest path  ->"],
    "summarization": ["human:", "model:", "ROUGE-L", "greedy search"],
    "question_answering": ["What type has", "exact match", "F1", "inference"],
}


def run_quick(script, path, *arguments):
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--quick", "--checkpoint", str(path), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_script_runs_and_its_checkpoint_gives_the_same_results(script, tmp_path):
    texts = ["Find the shortest path"] if script in ("simple_transformer", "translation") else []
    steps, dtype = ("--steps", "30"), ("--dtype", "bfloat16" if script == "translation" else "float32")
    printed = run_quick(script, tmp_path / "x.pt", *steps, *dtype, *texts)
    for shown in (
        *PROMISED[script],
        "training",
        "30/30",
        "training step",
        "torch.nn",
        "tformer_ext",
        "million parameters",
    ):
        assert shown in printed, shown
    if script == "simple_transformer":  # the task that 30 steps suffice for
        accuracy, majority = re.search(r"accuracy ([\d.]+) %; always the largest package: ([\d.]+) %", printed).groups()
        assert float(accuracy) > float(majority) + 10
    losses = [float(number) for number in re.search(r"^loss: (.*);", printed, re.MULTILINE)[1].split(" -> ")]
    assert losses[-1] < losses[0]

    again = run_quick(script, tmp_path / "x.pt", *steps, *dtype, *texts)
    assert "30 steps done" in again and "30/30" not in again

    def results(text):  # what stands between the losses and the measured times
        return re.search(r"^loss: .*?;[^\n]*\n(.*)\n +milliseconds", text, re.MULTILINE | re.DOTALL)[1]

    assert results(again) == results(printed)
