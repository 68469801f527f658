"""Every training example learns from files of the kinds that users have, and leaves a model that loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import deberta_kernels as dk
from deberta_kernels.native import processor

from .conftest import EXAMPLES

NAMES = ("sequence_classification", "token_classification", "question_answering", "multiple_choice", "masked_lm")
TINY = ("--length", "32", "--batch-size", "4")
RECORDS: dict[str, list[dict[str, Any]]] = {
    "sequence_classification": [{"text": "a very small text", "label": 1}, {"text": "a big text", "label": 0}],
    "token_classification": [{"tokens": ["a", "very", "small", "text"], "tags": ["O", "B-X", "I-X", "O"]}],
    "question_answering": [
        {"question": "how small?", "context": "a very small text", "answers": {"text": ["very"], "answer_start": [2]}},
        {"question": "how big?", "context": "the very big house", "answers": {"text": [], "answer_start": []}},
        {"question": "what?", "context": "a bad film", "answers": [{"text": "film", "answer_start": 6}]},
    ],
    "multiple_choice": [{"context": "a very", "endings": ["small text", "big house"], "label": 1}],
    "masked_lm": [{"text": "a very small text"}],
}


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_fused_on_its_own_text_and_a_new_vocabulary(name, train):
    dk.reset_stats()
    found = train(name, "--steps", "2", "--limit", "40", "--length", "32", "--batch-size", "2")
    assert found["patched"]
    assert found["steps"] == 2
    assert sum(dk.stats()["calls"].values()) > 0
    assert dk.stats()["fallbacks"] == {}


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_a_checkpoint_on_json_lines(name, train, checkpoint, json_lines, tmp_path):
    file = json_lines(RECORDS[name] * 6)
    found = train(name, *TINY, "--epochs", "2", "--data", file, "--model", checkpoint(), "--no-patch")
    assert not found["patched"]
    assert [x["step"] for x in found["history"]] == [found["steps"] // 2, found["steps"]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "output" / "model")
    assert tokenizer("very").input_ids[1] == 9
    assert not (tmp_path / "output" / "last.pt").exists()


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_a_table_of_reviews_with_labels_that_are_words(name, train, checkpoint, table, tmp_path):
    rows = [(f"a {word}, {word} film", word) for word in ("good", "bad")] * 10
    file = table(("review", "sentiment"), *rows, name=name)
    options = ("--text-column", "review", "--label-column", "sentiment", "--learning-rate", "1e-2", "--epochs", "12")
    found = train("sequence_classification", *TINY, "--data", file, "--model", checkpoint(), *options)
    assert found["metrics"]["accuracy"] == 1
    assert found["metrics"]["macro_f1"] == 1
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "output" / "model")
    assert model.config.label2id == {"bad": 0, "good": 1}
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "output" / "model"), device="cpu")
    assert [x["label"] for x in pipe(["a good, good film", "a bad, bad film"])] == ["good", "bad"]


def test_the_card_tells_metrics_data_versions_and_the_measured_speed(train, checkpoint, table, tmp_path):
    file = table(("text", "label"), *[("a good film", 1), ("a bad film", 0)] * 10)
    arguments = (*TINY, "--steps", "3", "--data", file, "--model", checkpoint(), "--comparison-seconds", "5")
    found = train("sequence_classification", *arguments)
    speed = found["speed"]
    card = (tmp_path / "output" / "model" / "README.md").read_text(encoding="utf-8")
    assert f"| accuracy | {found['metrics']['accuracy']:.4f} |" in card
    assert "rows.csv (18 records)" in card
    assert f"torch {torch.__version__}" in card
    assert f"on the stock model: {processor.everyday_name()}, " in card
    assert f"| {speed['patched']['inference']:,.0f} | {speed['stock']['inference']:,.0f} |" in card
    assert speed["batches"] == 3
    assert dk.stats()["fallbacks"] == {}


def test_timing_leaves_the_weights_and_the_patch_alone(program, checkpoint):
    from parts.speed import compare

    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint())
    dk.patch(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    batch = {
        "input_ids": torch.tensor([[1, 5, 6, 2]]),
        "attention_mask": torch.ones(1, 4).long(),
        "labels": torch.tensor([1]),
    }
    dk.reset_stats()
    found = compare(model, [batch] * 4, lambda model, batch: model(**batch).loss, "cpu", 60)
    assert found["tokens"] == 16
    # Two layers; before the timed batches two steps and an inference of each model.
    assert sum(dk.stats()["calls"].values()) >= 2 * (3 + 2 * 4)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    calls = sum(dk.stats()["calls"].values())
    model(**batch)
    assert sum(dk.stats()["calls"].values()) == calls + 2  # it is patched still
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_row_counts_the_same_where_the_last_batch_of_a_step_is_smaller(train, checkpoint, table):
    rows = [("a good film", "x"), ("a bad, bad house", "y"), ("a text", "y"), ("the very small text", "x")]
    model = checkpoint(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    data = ("--data", table(("text", "label"), *rows), "--model", model, "--steps", "1", "--length", "16")
    losses = []
    for size, accumulation in ((3, 1), (2, 2)):
        sizes = ("--batch-size", str(size), "--accumulation", str(accumulation))
        found = train("sequence_classification", *data, *sizes, output=f"output{size}")
        losses.append(found["history"][0]["training_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_best_checkpoint_is_kept_and_training_stops_early(train, checkpoint, table, tmp_path, capsys):
    # What was learnt last is wrong on the validation file, so that its loss rises from some step on.
    data = table(("text", "label"), *[("a good film", 1), ("a bad film", 0)] * 8, name="data.csv")
    validation = table(("text", "label"), ("a good film", 0), ("a bad film", 1), name="validation.csv")
    options = (
        "--evaluate-every",
        "1",
        "--metric",
        "loss",
        "--patience",
        "2",
        "--learning-rate",
        "1e-2",
        "--warmup",
        "0",
    )
    found = train(
        "sequence_classification", *TINY, "--data", data, "--validation", validation, "--model", checkpoint(),
        "--steps", "40", *options,
    )  # fmt: skip
    losses = [x["loss"] for x in found["history"]]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert found["best_step"] == best + 1
    assert len(losses) == best + 3 < 40
    assert "stopped early" in capsys.readouterr().out
    assert f"step {best + 1}, the best by loss" in (tmp_path / "output" / "model" / "README.md").read_text()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "output" / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "output" / "model")
    batch = tokenizer(["a good film", "a bad film"], return_tensors="pt")
    assert model(**batch, labels=torch.tensor([0, 1])).loss.item() == pytest.approx(losses[best], rel=1e-4)


@pytest.mark.parametrize("options", [("--precision", "float16"), ("--precision", "bfloat16", "--checkpointing")])
def test_precisions_and_checkpoints(options, train):
    found = train("masked_lm", "--steps", "2", "--limit", "30", "--length", "32", *options)
    assert found["metrics"]["perplexity"] > 1


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name, train, checkpoint, json_lines):
    schedule = ("--learning-rate", "1e-2", "--schedule", "constant", "--warmup", "0", "--patience", "0")
    data = ("--data", json_lines(RECORDS[name] * 12), "--model", checkpoint())
    found = train(name, *TINY, *data, "--steps", "60", "--evaluate-every", "15", *schedule)
    losses = [x["training_loss"] for x in found["history"]]
    assert losses[-1] < 0.9 * losses[0]


def test_a_file_in_squads_own_format_with_a_long_context(train, checkpoint, tmp_path):
    context = "the film is bad " * 12 + "anna works for acme in berlin"
    answer = {"text": "acme", "answer_start": context.index("acme")}
    paragraph = {
        "context": context,
        "qas": [{"question": "for what", "answers": [answer]}, {"question": "how", "answers": []}],
    }
    other = {
        "context": "a small house",
        "qas": [{"question": "what", "answers": [{"text": "house", "answer_start": 8}]}],
    }
    file = tmp_path / "squad.json"
    content = {"version": "v2.0", "data": [{"title": "x", "paragraphs": [paragraph, other, *[other] * 4]}]}
    file.write_text(json.dumps(content), encoding="utf-8")
    options = (
        "--data",
        str(file),
        "--validation",
        str(file),
        "--model",
        checkpoint(),
        "--length",
        "24",
        "--stride",
        "6",
    )
    found = train("question_answering", *options, "--epochs", "60", "--learning-rate", "5e-3", "--patience", "0")
    assert found["metrics"]["f1_answerable"] == 1
    assert found["metrics"]["accuracy_unanswerable"] == 1
    assert found["metrics"]["exact_match"] == 1


def test_numbered_tags_get_their_names(train, checkpoint, json_lines, tmp_path):
    file = json_lines([{"words": ["anna", "works", "in", "berlin"], "ner": [1, 0, 0, 2]}] * 8)
    options = ("--tokens-column", "words", "--tags-column", "ner", "--tag-names", "O,B-PER,B-LOC")
    found = train("token_classification", *TINY, "--steps", "2", "--data", file, "--model", checkpoint(), *options)
    assert {"f1", "precision", "recall"} <= set(found["metrics"])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "output" / "model")
    assert sorted(config.label2id) == ["B-LOC", "B-PER", "O"]


def test_the_head_of_a_checkpoint_keeps_its_labels(train, checkpoint, table, tmp_path):
    names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    model = checkpoint("DebertaV2ForSequenceClassification", **names)
    file = table(("text", "label"), *[("a good film", "good"), ("a bad film", "bad")] * 5)
    train("sequence_classification", *TINY, "--steps", "1", "--data", file, "--model", model, "--learning-rate", "1e-9")
    before, after = (
        transformers.AutoModelForSequenceClassification.from_pretrained(x)
        for x in (model, tmp_path / "output" / "model")
    )
    assert after.config.label2id == {"good": 0, "bad": 1}
    torch.testing.assert_close(after.classifier.weight, before.classifier.weight)


def test_a_new_head_begins_anew(train, checkpoint, table, tmp_path):
    model = checkpoint("DebertaV2ForSequenceClassification")
    rows = [("a good film", "good"), ("a bad film", "bad"), ("a film", "neither")] * 5
    file = table(("text", "label"), *rows)
    train("sequence_classification", *TINY, "--steps", "1", "--data", file, "--model", model, "--new-head")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "output" / "model")
    assert config.label2id == {"bad": 0, "good": 1, "neither": 2}


@pytest.mark.parametrize("name", ["token_classification", "multiple_choice"])
def test_a_checkpoint_of_another_task_gets_a_new_head(name, train, checkpoint, json_lines, tmp_path, capsys):
    # Its classifier has the same name, and for three labels the same shape as that of three tags.
    model = checkpoint("DebertaV2ForSequenceClassification", num_labels=3)
    data = ("--data", json_lines(RECORDS[name] * 6), "--model", model)
    train(name, *TINY, *data, "--steps", "1", "--learning-rate", "1e-9")
    assert "not in the checkpoint, so trained from nothing: classifier" in capsys.readouterr().out
    from safetensors.torch import load_file

    old, new = (load_file(Path(x) / "model.safetensors") for x in (model, tmp_path / "output" / "model"))
    assert old["classifier.weight"].shape != new["classifier.weight"].shape or not torch.allclose(
        old["classifier.weight"], new["classifier.weight"], atol=1e-3
    )
    torch.testing.assert_close(
        new["deberta.embeddings.word_embeddings.weight"], old["deberta.embeddings.word_embeddings.weight"]
    )


def test_one_command_shows_both_models_and_saves_nothing(tmp_path: Path):
    small = ("--steps", "1", "--limit", "12", "--length", "32", "--batch-size", "2", "--device", "cpu")
    command = [sys.executable, str(EXAMPLES / "sequence_classification.py"), *small]
    done = subprocess.run(
        [*command, "--comparison-seconds", "1"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "| patched | stock |" in done.stdout
    assert "tokens/s" in done.stdout
    assert "--output DIR keeps" in done.stdout
    assert list(tmp_path.iterdir()) == []
