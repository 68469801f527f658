"""The command line: info, explain, bench, and the demo from end to end on a small model."""

import csv
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import deberta_kernels
from deberta_kernels.__main__ import main
from deberta_kernels.demo import text
from deberta_kernels.demo.measure import MeasurementError, in_child
from deberta_kernels.testing import geometries

ROOT = Path(deberta_kernels.__file__).resolve().parents[1]
LINUX = sys.platform.startswith("linux")
TINY = geometries.settings("tiny", vocab_size=200, num_attention_heads=2)


def command(*arguments, cwd=None, **environment):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    state = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "deberta_kernels", *map(str, arguments)],
        cwd=cwd, env=state, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("tiny")
    transformers.DebertaV2Model(transformers.DebertaV2Config(**TINY)).save_pretrained(folder)
    return folder


def test_info_names_version_backends_and_library():
    done = command("info")
    assert done.returncode == 0, done.stderr
    for word in (deberta_kernels.__version__, "torch", "library", "backends"):
        assert word in done.stdout


def test_info_says_why_the_library_is_not_used():
    done = command("info", DEBERTA_KERNELS_LIBRARY="/nowhere/library.so")
    assert done.returncode == 0, done.stderr
    assert "/nowhere/library.so" in done.stdout


def test_explain_names_the_backend_and_each_refusal(capsys):
    assert main(["explain", "--dtype", "float64", "--mask", "pair", "--dropout", "0.1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("torch would run")
    assert "not cpu: " in said


def test_explain_takes_no_memory_for_long_sequences(capsys):
    assert main(["explain", "--length", "1000000", "--batch", "64", "--mask", "pair", "--backend", "torch"]) == 0
    assert "torch would run" in capsys.readouterr().out


def test_installed_benchmark_prints_a_line_per_length(capsys, monkeypatch):
    from deberta_kernels.bench import core

    monkeypatch.setattr(core.torch, "set_num_threads", lambda threads: None)
    assert core.run(["--lengths", "16,40", "--seconds", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["16", "40"]


@pytest.mark.skipif(not LINUX, reason="the demo measures memory through /proc")
def test_demo_measures_a_local_checkpoint(tiny_checkpoint, tmp_path):
    done = command("demo", tiny_checkpoint, "--lengths", "9,40", "--quick", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "time before" in done.stdout
    assert "1 x 40: time before and after" in done.stderr
    assert "words are hashed to token ids" in done.stderr
    found = json.loads((tmp_path / "demo-results" / "demo.json").read_text())
    assert [(row["batch"], row["tokens"]) for row in found["rows"]] == [(1, 9), (1, 40), (4, 40)]
    assert found["conditions"]["threads"] == 1
    for row in found["rows"]:
        assert row["difference"] <= 1e-5 * max(1, row["scale"])
        assert row["backend"] in ("cpu", "torch")
        assert min(row["seconds_before"], row["seconds_after"]) > 0
        assert row["bytes_before"] >= 0
    with (tmp_path / "demo-results" / "demo.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    drawn = (tmp_path / "demo-results" / "demo.png").exists()
    assert drawn or "matplotlib is not installed" in done.stdout


@pytest.mark.skipif(not LINUX, reason="the demo measures memory through /proc")
def test_measuring_process_passes_its_error_on():
    def fail():
        raise ValueError("no such luck")

    with pytest.raises(MeasurementError, match="no such luck"):
        in_child(fail, threads=1)
    with pytest.raises(MeasurementError, match="ended with status 3"):
        in_child(lambda: os._exit(3), threads=1)
    assert in_child(lambda: {"answer": 42}, threads=1) == {"answer": 42}


def test_text_is_installed_and_long_enough():
    assert resources.files("deberta_kernels.demo").joinpath("text.txt").is_file()
    assert sum(len(part.split()) for part in text.paragraphs()) > 1900


@pytest.mark.parametrize("length", [3, 17, 512, 5000])
def test_single_input_has_exactly_the_length_asked_for(length):
    ids, mask = text.single(text.hashing_encoder(1000), length)
    assert ids.shape == mask.shape == (1, length)
    assert (ids[0, 0], ids[0, -1]) == (text.CLS, text.SEP)
    assert int(ids.max()) < 1000
    assert bool(mask.all())


def test_ragged_batch_pads_on_the_right_and_mixes_lengths():
    ids, mask = text.ragged_batch(text.hashing_encoder(1000), 8, 100)
    lengths = mask.sum(-1)
    assert ids.shape == (8, 100)
    assert len(set(lengths.tolist())) >= 5
    assert bool((ids[mask == 0] == text.PAD).all())
    assert [int(row[n - 1]) for row, n in zip(ids, lengths)] == [text.SEP] * 8
