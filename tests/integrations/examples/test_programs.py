"""The examples of inference: what they print, patched beside stock, and what they say of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deberta_kernels as dk
from tests import needs

TEXTS = ["anna works for acme in berlin", "the film is very good and it is a very big film", "a bad house"]
NLI = {"id2label": {0: "entailment", 1: "neutral"}, "label2id": {"entailment": 0, "neutral": 1}}
PROGRAMS = ("rerank", "zero_shot", "ner_gliner")
ASKED = {
    "rerank": ("--query", "good film"),
    "zero_shot": ("--labels", "good,bad"),
    "ner_gliner": ("--labels", "person,city"),
}


@pytest.fixture
def run(program: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run one of the programs; return its exit code and what it wrote to stdout and stderr."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        from comparing import main

        capsys.readouterr()
        code = main(program(name).run, [*ASKED[name], *arguments])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def model(checkpoint: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Make a tiny checkpoint for one of the programs."""

    def model(name: str) -> str:
        if name == "rerank":
            needs.package("sentence_transformers")
            return checkpoint("DebertaV2ForSequenceClassification", num_labels=1)
        if name == "zero_shot":
            return checkpoint("DebertaV2ForSequenceClassification", **NLI)
        package = needs.package("gliner")
        torch.manual_seed(0)
        backbone = checkpoint()
        config = package.GLiNERConfig(model_name=backbone, hidden_size=32, max_width=4, dropout=0.0)
        found = package.GLiNER.from_config(config, load_tokenizer=True, backbone_from_pretrained=True)
        folder = tmp_path_factory.mktemp("gliner")
        found.save_pretrained(folder)
        return str(folder)

    return model


EACH = pytest.mark.parametrize(
    "name",
    [
        pytest.param("rerank", marks=pytest.mark.packages("sentence_transformers")),
        "zero_shot",
        pytest.param("ner_gliner", marks=pytest.mark.packages("gliner")),
    ],
)


@EACH
def test_compare_tells_difference_and_speed(name, run, model):
    dk.reset_stats()
    options = ("--threshold", "0.0") if name == "ner_gliner" else ()
    code, out, err = run(name, *TEXTS, "--model", model(name), "--batch-size", "2", "--compare", *options)
    assert code == 0
    assert "times the speed" in err
    difference = float(err.split("largest difference of a score ")[1].split(";")[0])
    assert difference < 1e-4
    assert any(part in err for part in ("; 0 of 3 ranks", "; 0 of 3 texts", "; 0 of "))
    assert sum(dk.stats()["calls"].values()) > 0
    assert dk.stats()["fallbacks"] == {}
    assert all(text in out for text in TEXTS)


@EACH
def test_results_of_a_file_go_into_a_file(name, run, model, table, tmp_path):
    file = table(("title", "body"), *[("x", text) for text in TEXTS])
    folder = model(name)
    found = {}
    for patch in ((), ("--no-patch",)):
        dk.reset_stats()
        output = tmp_path / f"found{len(patch)}.jsonl"
        arguments = ("--file", file, "--text-column", "body", "--model", folder, "--output", str(output), *patch)
        code, out, err = run(name, *arguments)
        assert (code, out) == (0, "")
        assert "3 results in" in err
        found[patch] = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert (sum(dk.stats()["calls"].values()) > 0) == (not patch)
    assert len(found[()]) == 3
    if name == "rerank":
        assert [x["passage"] for x in found[()]] == [x["passage"] for x in found["--no-patch",]]
        assert [x["rank"] for x in found[()]] == [1, 2, 3]
        scores = [x["score"] for x in found[()]]
        assert scores == sorted(scores, reverse=True)
    if name == "zero_shot":
        assert found[()][0]["labels"] == found["--no-patch",][0]["labels"]
        assert sum(found[()][0]["scores"]) == pytest.approx(1)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, run, monkeypatch):
    package = {"rerank": "sentence_transformers", "zero_shot": "transformers", "ner_gliner": "gliner"}[name]
    import comparing

    real = comparing.importlib.import_module

    def absent(wanted: str) -> Any:
        if wanted == package:
            raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted)
        return real(wanted)

    monkeypatch.setattr(comparing.importlib, "import_module", absent)
    code, out, err = run(name, "a text")
    assert (code, out) == (2, "")
    wanted = package.replace("_", "-")
    assert err == f"error: this example needs {wanted}: pip install {wanted}\n"


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give texts on the command line, or a file of them with --file (one of the two)."),
        (("a", "--file", "x.txt"), "(one of the two)"),
        (("--file", "nothing.txt"), "there is no file nothing.txt."),
        (("a", "--compare", "--no-patch"), "leave --no-patch out"),
        (("a", "--batch-size", "0"), "--batch-size must be at least 1, got 0."),
        (("a", "--device", "nowhere"), "--device nowhere cannot be used, try --device cpu"),
        (("a", "--output", "."), "--output . must be a file, got a folder."),
    ],
)
def test_bad_arguments(name, arguments, message, run):
    code, out, err = run(name, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "--labels", "one"), "--labels must have two or more, got 'one'; one alone needs --multi-label."),
        (("a", "--hypothesis", "about it"), "--hypothesis must hold {} where the label goes, got 'about it'."),
        (("a", "--model", "no/such-model"), "--model no/such-model cannot be loaded"),
    ],
)
def test_bad_arguments_of_zero_shot(arguments, message, run):
    code, _, err = run("zero_shot", *arguments)
    assert code == 2
    assert message in err


def test_a_model_without_entailment(run, checkpoint):
    code, _, err = run("zero_shot", "a", "--model", checkpoint("DebertaV2ForSequenceClassification"))
    assert code == 2
    assert "has no label that begins with entail, it has LABEL_0, LABEL_1; take an NLI model" in err


@pytest.mark.packages("sentence_transformers")
def test_a_classifier_cannot_rank(run, checkpoint):
    needs.package("sentence_transformers")
    code, _, err = run("rerank", "a", "--model", checkpoint("DebertaV2ForSequenceClassification"))
    assert code == 2
    assert "gives 2 scores for a pair, a ranking needs one" in err
    assert run("rerank", "a", "--top", "0")[2] == "error: --top must be at least 1, got 0.\n"


def test_bad_arguments_of_gliner(run):
    assert "--threshold must be between 0 and 1, got 2.0" in run("ner_gliner", "a", "--threshold", "2")[2]
    assert "--labels must name at least one kind" in run("ner_gliner", "a", "--labels", " ,")[2]


def test_a_model_without_a_deberta_is_named(program):
    program("zero_shot")
    import comparing
    from parts.task import InputError

    with pytest.raises(InputError, match="--model some/bert holds no DeBERTa; --no-patch runs it as it is"):
        comparing.check_deberta(torch.nn.Linear(1, 1), "some/bert")


def test_half_written_results_are_not_there(program, tmp_path: Path):
    program("zero_shot")
    import comparing

    with pytest.raises(TypeError):
        comparing.write(tmp_path / "found.jsonl", [{"x": object()}], str)
    assert list(tmp_path.iterdir()) == []
