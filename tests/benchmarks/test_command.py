"""The command line: kinds, their lists, the numbers of threads, the time left."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks.harness import record
from benchmarks.listing import listing


def test_help_has_a_line_for_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.split()[:1] == [name] for line in lines) for name in command.KINDS)
    assert command.main([]) == 2
    assert command.main(["nonsense"]) == 2
    assert "unknown kind 'nonsense'; there are core, model" in capsys.readouterr().err


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a run sets for torch and the hub."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("kind", command.KINDS)
def test_every_kind_has_options_and_a_list(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main([kind, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: python -m benchmarks {kind}" in text
    assert ("--threads" in text) or not command.KINDS[kind].threaded
    assert command.main([kind, "--list"]) == 0
    assert capsys.readouterr().out.strip() == listing(kind)


def test_lists_hold_shapes_candidates_and_figures() -> None:
    text = listing("model")
    assert "8x128 60% full bfloat16" in text
    assert "onnx, onnxruntime" in text
    assert "time / time of BERT with SDPA, float32" in text
    assert "flashdeberta 0.0.8" in listing("gpu")
    assert "v2-xxlarge" in listing("memory")
    assert "eight sentences in each batch, 64 texts" in listing("texts")
    assert "patched, bfloat16" in listing("texts")


def test_threads_are_numbers_or_all_each_once() -> None:
    every = command.counts("all")[0]
    assert command.counts("1,all,1") == list(dict.fromkeys([1, every]))
    for text in ("0", "many", "1,,2"):
        with pytest.raises(SystemExit, match="--threads must be numbers from 1 on, or all"):
            command.counts(text)


def test_each_number_of_threads_gets_a_process_and_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(arguments: list[str], **_: Any) -> Any:
        commands.append(arguments[3:])
        return subprocess.CompletedProcess(arguments, len(commands) - 1)

    monkeypatch.setattr(command.subprocess, "run", run)
    assert command.main(["core", "--threads", "1,3", "--json", "out.json", "--quick"]) == 1
    assert commands == [
        ["core", "--threads", "1", "--json", "out.json", "--quick"],
        ["core", "--threads", "3", "--json", "out-3threads.json", "--quick"],
    ]


@pytest.mark.usefixtures("environment")
def test_a_run_of_one_number_stays_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    class Module:
        @staticmethod
        def main(arguments: list[str]) -> int:
            seen.append(arguments)
            return 5

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Module)
    assert command.main(["core", "--threads", "2", "--quick"]) == 5
    assert command.main(["report", "--text"]) == 0 + 5
    assert seen == [["--quick", "--threads", "2"], ["--text"]]
    assert command.os.environ["OMP_NUM_THREADS"] == "2"


def test_the_time_left_follows_the_work_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = record.Progress([1, 3, 6])
    now[0] += 20
    assert progress.step("first") == "3 min"  # 9 of 10 parts are left, 20 s each
    now[0] += 60
    assert progress.step() == "2 min"
    now[0] += 120
    assert progress.step("last") == "0 s"
    assert "1 of 3, 3 min left; first" in capsys.readouterr().err


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("core --only sdpa32,nonsense", "--only: unknown nonsense; there are sdpa32, sdpa16,"),
        ("core --backend gpu", "--backend: invalid choice: 'gpu'"),
        ("model --only float64", "--only: unknown float64; there are float32, bfloat16"),
        ("model missing", "there is no folder 'missing'"),
        ("texts missing", "there is no folder 'missing'"),
        ("train --sizes 8", "--sizes: unknown 8; there are 8x128, 4x512"),
        ("linear --tokens 4,x", "--tokens: must be whole numbers from 1 on, separated by commas, got '4,x'"),
        ("linear --tokens 0", "--tokens: must be whole numbers from 1 on"),
        ("adapters --only zzz", "--only: unknown zzz; there are "),
        ("convergence --model . --data missing", "--data: there is no file 'missing'"),
        ("soak --steps 3", "--steps must be at least 25"),
        ("gpu --stages zz", "--stages: unknown zz; there are ceilings, compile,"),
        ("gpu --lengths -5", "--lengths: must be whole numbers from 1 on"),
        ("tune --dims 0", "--dims: must be whole numbers from 1 on"),
        ("report missing.json", "there is no file 'missing.json'"),
        ("report --update missing.md", "--update: there is no file 'missing.md'"),
    ],
)
def test_bad_options_are_named_before_anything_runs(
    given: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *rest = given.split()
    with pytest.raises(SystemExit) as left:
        command.main([name, *rest, *(["--threads", "1"] if command.KINDS[name].threaded else [])])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
