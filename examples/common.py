"""What the examples share: options, tokenizer, batches, the training loop with its checkpoint, the speed table."""

import argparse
import math
import random
import time
import warnings
from pathlib import Path
from statistics import fmean, median

import tokenizers
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import tformer_ext as tx

PAD, START, END = 0, 1, 2  # ids of the special tokens of every tokenizer made here
UNKNOWN = 3  # of train_words only
SAVE_EVERY = 100

console = Console(highlight=False, width=None if Console().is_terminal else 120)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def checkpoint_path(text):
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text}")
    return path


def parse_options(document, task, steps, quick_steps, argv=None, **positional):
    """The options that all examples take. positional: name=help of words to try the trained model on."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in positional.items():
        parser.add_argument(name, nargs="*", metavar="TEXT", help=text)
    parser.add_argument("--steps", type=positive, help=f"training steps in all (default: {steps})")
    parser.add_argument(
        "--checkpoint",
        type=checkpoint_path,
        metavar="PATH",
        help=f"file of the training's state (default: {task}.pt in the current folder). Where it exists, training goes "
        "on from it; if all steps are done, only the results are shown",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: autocast; weights stay float32 (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model on little text: shows that all works")
    options = parser.parse_args(argv)
    options.task = task
    options.steps = options.steps or (quick_steps if options.quick else steps)
    options.checkpoint = options.checkpoint or Path(f"{task}-quick.pt" if options.quick else f"{task}.pt")
    torch.manual_seed(options.seed)
    return options


def autocast(options):
    return torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16")


def train_tokenizer(texts, size):
    """A byte-pair encoding of `size` tokens learned from texts; it can spell any text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True),
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<start>", "<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_words(texts, size):
    """A tokenizer of the `size` most frequent words; signs are words too, all others are UNKNOWN."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unknown>"))
    word = tokenizers.Regex(r"\w+([-'.]\w+)*|[^\w\s]")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(word, "removed", invert=True)
    special = ["<pad>", "<start>", "<end>", "<unknown>"]
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def widen(t):
    """In float32 at least, whatever autocast made of it."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def shorten(text, width):
    """The beginning of the text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def pad(rows):
    """Lists of ids as one int64 tensor (B, longest)."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


class Batches:
    """batches[step]: examples of about equal length, every one once per epoch, in an order that the seed decides."""

    def __init__(self, examples, size, seed, length=len):
        self.examples, self.size, self.seed, self.length = examples, size, seed, length
        self.epoch = None

    def __getitem__(self, step):
        epoch, index = divmod(step, math.ceil(len(self.examples) / self.size))
        if epoch != self.epoch:
            rng = random.Random(f"{self.seed} {epoch}")
            order = sorted(self.examples, key=lambda example: self.length(example) * rng.uniform(0.9, 1.1))
            self.batches = [order[i : i + self.size] for i in range(0, len(order), self.size)]
            rng.shuffle(self.batches)
            self.epoch = epoch
        return self.batches[index]


class Checkpoint:
    """The file that holds a training's state: weights, optimizer, random numbers, tokenizer, step and losses."""

    def __init__(self, options, **settings):
        self.path = options.checkpoint
        self.state = {"settings": {"task": options.task, "seed": options.seed, "quick": options.quick, **settings}}
        if self.path.exists():
            try:
                state = torch.load(self.path, weights_only=True)
                found = state["settings"]
            except Exception as error:  # what torch.load raises depends on what the file is
                raise SystemExit(f"{self.path} is not a checkpoint of these examples: {error}") from error
            if found != self.state["settings"]:
                raise SystemExit(f"{self.path} was made with {found}, this run asks for {self.state['settings']}")
            self.state = state

    @property
    def step(self):
        return self.state.get("step", 0)

    def tokenizer(self, texts, size, train=train_tokenizer):
        """The tokenizer in the file, else a new one."""
        if "tokenizer" not in self.state:
            self.state["tokenizer"] = train(texts, size).to_str()
        return tokenizers.Tokenizer.from_str(self.state["tokenizer"])

    def save(self, **state):
        self.state |= state
        unfinished = self.path.with_name(self.path.name + ".part")
        torch.save(self.state, unfinished)
        unfinished.replace(self.path)


def train(model, loss_of, batches, options, checkpoint, learning_rate=1.5e-3):
    """AdamW on loss_of(model, batch), the learning rate up over a tenth of the steps, then down to 0.

    Goes on from the checkpoint, saves it every SAVE_EVERY steps and at the end, and loads the weights back from there.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    if checkpoint.step:
        model.load_state_dict(checkpoint.state["model"])
        optimizer.load_state_dict(checkpoint.state["optimizer"])
        torch.set_rng_state(checkpoint.state["rng"])
        losses = checkpoint.state["losses"]
        console.print(f"{checkpoint.path}: {checkpoint.step} steps done")
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters / 1e6:.1f} million parameters, {torch.get_num_threads()} threads, {options.dtype}")
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    begin = time.perf_counter()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=checkpoint.step >= options.steps) as bar:
        task = bar.add_task("", total=options.steps, completed=checkpoint.step, loss="")
        for step in range(checkpoint.step, options.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(10 * (step + 1), 1.1 * (options.steps - step)) / options.steps
            losses.append(training_step(model, loss_of, batches[step], optimizer, options))
            bar.update(task, advance=1, loss=f"loss {fmean(losses[-50:]):.3f}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == options.steps:
                checkpoint.save(
                    model=model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    rng=torch.get_rng_state(),
                    step=step + 1,
                    losses=losses,
                )
    means = [fmean(losses[i : i + 20]) for i in range(0, len(losses), max(20, len(losses) // 6))]
    console.print(f"loss: {' -> '.join(f'{mean:.3f}' for mean in means)}; {time.perf_counter() - begin:.0f} s")
    model.load_state_dict(torch.load(checkpoint.path, weights_only=True)["model"])
    return model.eval()


def training_step(model, loss_of, batch, optimizer, options):
    model.train()
    with autocast(options):
        loss = loss_of(model, batch)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def compare_speed(build, trained, loss_of, batch, options, uses):
    """Prints milliseconds of torch.nn's modules and of tformer_ext's, taken in turn, on the trained weights.

    Args:
        build: build(modules) gives a model of the classes in modules.
        uses: {name: function of a model in eval mode}, measured besides a training step with batch.
    """
    rounds = 3 if options.quick else 7
    models = {"torch.nn": build(nn), "tformer_ext": build(tx)}
    times = {}
    for model in models.values():
        model.load_state_dict(trained.state_dict())
    optimizers = {name: torch.optim.AdamW(model.parameters(), 0.0) for name, model in models.items()}

    def measure(row, name, function, *arguments):
        begin = time.perf_counter()
        function(*arguments)
        times.setdefault(row, {}).setdefault(name, []).append(1e3 * (time.perf_counter() - begin))

    warnings.filterwarnings("ignore", message=".*nested tensors is in prototype")  # torch.nn's path in eval mode
    for _ in range(rounds + 1):
        for name, model in models.items():
            measure("training step", name, training_step, model, loss_of, batch, optimizers[name], options)
        for row, use in uses.items():
            for name, model in models.items():
                with torch.inference_mode(), autocast(options):
                    measure(row, name, use, model.eval())
    table = Table("", *models, "ratio", title=f"milliseconds, median of {rounds}, in turn ({options.dtype})")
    for row, columns in times.items():
        stock, ours = (median(taken[1:]) for taken in columns.values())  # the first round warms up
        table.add_row(row, f"{stock:.1f}", f"{ours:.1f}", f"{stock / ours:.2f} x")
    console.print(table)
