"""Every example trains for a few steps, patched and stock, from its own data and from a file."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import deberta_kernels as dk

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("sequence_classification", "token_classification", "question_answering", "multiple_choice", "masked_lm")
RECORDS: dict[str, dict[str, Any]] = {
    "sequence_classification": {"text": "a very small text", "label": 1},
    "token_classification": {"tokens": ["a", "very", "small", "text"], "tags": [0, 2, 1, 0]},
    "question_answering": {
        "question": "how small?", "context": "a very small text", "answers": {"text": ["very"], "answer_start": [2]}
    },
    "multiple_choice": {"context": "a very", "endings": ["small text", "big house"], "label": 1},
    "masked_lm": {"text": "a very small text"},
}  # fmt: skip


@pytest.fixture
def task(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(request.param).TASK


def run(task: Any, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    from recipe import run

    assert run(task, ["--no-comparison", "--batch-size", "4", "--device", "cpu", *arguments]) == 0
    return dict(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))


@pytest.mark.parametrize("task", NAMES, indirect=True)
def test_it_trains_fused_on_its_own_data(task, capsys):
    dk.reset_stats()
    found = run(task, capsys, "--steps", "3")
    assert found["patched"]
    assert found["tokens_per_second"] > 0
    assert 0 <= found["right"] <= 1
    assert sum(dk.stats()["calls"].values()) > 0
    assert dk.stats()["fallbacks"] == {}


@pytest.mark.parametrize("task", NAMES, indirect=True)
def test_it_reads_a_file(task, capsys, tmp_path, request):
    record = RECORDS[request.node.callspec.params["task"]]
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join([json.dumps(record)] * 12), encoding="utf-8")
    before = dk.stats()["calls"]
    found = run(task, capsys, "--steps", "2", "--data", str(file), "--no-patch")
    assert not found["patched"]
    assert dk.stats()["calls"] == before


@pytest.mark.parametrize("task", ["masked_lm"], indirect=True)
@pytest.mark.parametrize("options", [("--precision", "float16"), ("--precision", "bfloat16", "--checkpointing")])
def test_precisions_and_checkpoints(task, options, capsys, tmp_path):
    found = run(task, capsys, "--steps", "2", *options, "--save", str(tmp_path / "saved"))
    assert found["last_loss"] > 0
    assert (tmp_path / "saved" / "config.json").exists()


@pytest.mark.parametrize("task", ["masked_lm", "token_classification"], indirect=True)
def test_the_loss_falls(task, capsys):
    found = run(task, capsys, "--steps", "30", "--learning-rate", "1e-3")
    assert found["last_loss"] < 0.9 * found["first_loss"]


def test_one_command_shows_both_models():
    command = [sys.executable, str(EXAMPLES / "sequence_classification.py"), "--steps", "4", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=EXAMPLES.parent)
    rows = [line.split()[0] for line in done.stdout.splitlines() if "tokens/s" in line and "peak memory" in line]
    assert rows == ["patched", "stock"]
    assert "4/4" in done.stderr  # the progress bar
