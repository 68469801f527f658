"""A run that is stopped goes on as if it had not been, bit for bit; what lies under its name is whole."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TINY = ("--device", "cpu", "--comparison-seconds", "0", "--length", "32", "--batch-size", "2", "--evaluate-every", "3")
STOPPED = 3


@pytest.fixture
def run(program: Callable[[str], Any]) -> Callable[..., int]:
    def run(name: str, *arguments: str, **changes: Any) -> int:
        from parts.recipe import run

        return run(dataclasses.replace(program(name).TASK, **changes), list(arguments))

    return run


@pytest.fixture
def data(table: Callable[..., str]) -> str:
    return table(
        ("text", "label"),
        *[(f"a {word} {what}", word) for word in ("good", "bad") for what in ("film", "house", "text")] * 3,
    )


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            if key != "seconds":
                assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for x, y in zip(one, other):
            assert_same(x, y)
    else:
        assert one == other


def state(folder: Path) -> dict[str, Any]:
    found = torch.load(folder / "last.pt", weights_only=True)
    return {name: x for name, x in found.items() if name != "options"}


@pytest.mark.parametrize("name", ["sequence_classification", "masked_lm"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_weights_of_one_that_was_never_stopped(name, precision, run, data, checkpoint, tmp_path):
    options = (
        *TINY,
        "--data",
        data,
        "--model",
        checkpoint(),
        "--accumulation",
        "2",
        "--precision",
        precision,
        "--steps",
        "12",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(name, *options, "--output", str(whole), "--stop-after", "8") == STOPPED
    assert run(name, *options, "--output", str(parts), "--stop-after", "4") == STOPPED
    torch.manual_seed(123)
    assert run(name, "--output", str(parts), "--resume", "--stop-after", "1") == STOPPED
    torch.manual_seed(456)
    assert run(name, "--output", str(parts), "--resume", "--stop-after", "3") == STOPPED
    assert state(whole)["standing"]["step"] == 8
    assert_same(state(whole), state(parts))
    assert run(name, "--output", str(whole), "--resume") == 0
    assert run(name, "--output", str(parts), "--resume") == 0
    assert (whole / "model" / "model.safetensors").read_bytes() == (parts / "model" / "model.safetensors").read_bytes()


def test_dropout_is_part_of_what_goes_on(run, data, checkpoint, tmp_path):
    options = (*TINY, "--data", data, "--model", checkpoint(), "--steps", "9")
    for folder in ("one", "other"):
        assert (
            run("sequence_classification", *options, "--output", str(tmp_path / folder), "--stop-after", "3") == STOPPED
        )
    found = torch.load(tmp_path / "other" / "last.pt", weights_only=True)
    torch.manual_seed(999)
    torch.save({**found, "random": {"cpu": torch.get_rng_state(), "cuda": []}}, tmp_path / "other" / "last.pt")
    for folder in ("one", "other"):
        assert (
            run("sequence_classification", "--output", str(tmp_path / folder), "--resume", "--stop-after", "1")
            == STOPPED
        )
    one, other = (state(tmp_path / folder)["model"] for folder in ("one", "other"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(number, run, data, checkpoint, tmp_path, capsys):
    asked = []

    def prepare(batch: Any, encoder: Any, generator: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:
            os.kill(os.getpid(), number)
        return batch

    before = signal.getsignal(number)
    options = (*TINY, "--data", data, "--model", checkpoint(), "--output", str(tmp_path / "output"))
    assert run("sequence_classification", *options, prepare=prepare) == STOPPED
    assert signal.getsignal(number) == before
    assert state(tmp_path / "output")["standing"]["step"] == 2
    assert "--resume" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_options(run, data, checkpoint, tmp_path, capsys):
    output = ("--output", str(tmp_path / "output"))
    options = (*TINY, "--data", data, "--model", checkpoint(), *output)
    assert run("sequence_classification", *options, "--stop-after", "1") == STOPPED
    assert run("sequence_classification", *output, "--resume", "--batch-size", "4") == 2
    assert "--batch-size was 2 when this run began, got 4" in capsys.readouterr().err
    assert run("masked_lm", *output, "--resume") == 2
    assert "a run of another example: Sequence classification" in capsys.readouterr().err
    assert run("sequence_classification", *options) == 2
    assert "is not empty; name another folder. Go on with the run in it: --resume." in capsys.readouterr().err
    Path(data).write_text(Path(data).read_text() + "a film,good\n", encoding="utf-8")
    assert run("sequence_classification", *output, "--resume") == 2
    assert "is not the file it was when this run began" in capsys.readouterr().err


def test_a_run_that_lost_its_beginning_is_refused(run, data, checkpoint, tmp_path, capsys):
    output = ("--output", str(tmp_path / "output"))
    options = (*TINY, "--data", data, "--model", checkpoint(), *output)
    assert run("sequence_classification", *options, "--stop-after", "1") == STOPPED
    shutil.rmtree(tmp_path / "output" / "start")
    assert run("sequence_classification", *output, "--resume") == 2
    assert "start is missing, without which the run in" in capsys.readouterr().err


def test_there_must_be_something_to_resume(run, data, checkpoint, tmp_path, capsys):
    output = ("--output", str(tmp_path / "output"))
    assert run("sequence_classification", "--resume") == 2
    assert "--resume needs --output DIR" in capsys.readouterr().err
    assert run("sequence_classification", "--resume", *output) == 2
    assert "there is no" in capsys.readouterr().err
    assert run("sequence_classification", *TINY, "--data", data, "--model", checkpoint(), "--steps", "1", *output) == 0
    assert run("sequence_classification", "--resume", *output) == 2
    assert "the run is finished" in capsys.readouterr().err
    (tmp_path / "output" / "start").mkdir()
    (tmp_path / "output" / "last.pt").write_bytes(b"no state")
    capsys.readouterr()
    assert run("sequence_classification", "--resume", *output) == 2
    assert "last.pt cannot be read" in capsys.readouterr().err


def test_what_is_half_written_never_takes_the_name(program, tmp_path):
    from parts.saving import beside

    program("masked_lm")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("whole")

    def fail() -> None:
        with beside(tmp_path / "model") as folder:
            folder.mkdir()
            (folder / "new").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]
    with beside(tmp_path / "model") as folder:
        folder.mkdir()
        (folder / "new").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]
