"""`bench --model`: every head of DeBERTa measured on texts, stock and patched; random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import deberta_kernels as dk
from deberta_kernels.__main__ import main
from deberta_kernels.bench import checkpoint, command, compare, show
from deberta_kernels.bench.agreement import Agreement, Answers, answers_of
from deberta_kernels.bench.batches import encode
from deberta_kernels.demo.measure import Case, MeasurementError
from tests import needs
from tests.checkout import ROOT
from tests.word_tokenizer import word_tokenizer

WORDS = [f"w{number}" for number in range(60)]
TEXTS = [" ".join(WORDS[start : start + length]) for start, length in ((0, 3), (5, 40), (9, 11), (2, 7), (30, 25))]
LINUX = sys.platform.startswith("linux")


@pytest.fixture
def save(build, tmp_path):
    """Save a small model with a tokenizer; return its directory."""

    def save(head, **settings):
        folder = tmp_path / head
        build(head, **settings).save_pretrained(folder)
        word_tokenizer(WORDS, longest=64).save_pretrained(folder)
        return folder

    return save


def timed(folder, wanted=(torch.float32,), batch_size=2, by_length=False):
    loaded = checkpoint.load(str(folder), wanted[0])
    batches = encode(loaded, TEXTS, batch_size, loaded.longest, by_length)
    models = compare.candidates(loaded.model, wanted)
    return loaded, batches, models, compare._timed(models, batches, lambda share, what: None)


# Head -> (configuration, labels of the five texts, whose 96 tokens count [CLS] and [SEP]).
HEADS = {
    "DebertaV2ForSequenceClassification": ({"num_labels": 3}, 5),
    "DebertaV2ForTokenClassification": ({"num_labels": 4}, 96),
    "DebertaV2ForMaskedLM": ({}, 96),
    "DebertaV2ForQuestionAnswering": ({}, 10),
    "DebertaV2ForMultipleChoice": ({}, None),
    "DebertaV2Model": ({}, None),
    "DebertaForSequenceClassification": ({"num_labels": 2}, 5),
    "DebertaModel": ({}, None),
}


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_measured(head, save):
    settings, labels = HEADS[head]
    loaded, batches, models, found = timed(save(head, **settings))
    assert type(loaded.model).__name__ == head
    assert (batches.texts, batches.tokens, batches.longest, batches.cut) == (5, 96, 42, 0)
    assert [case.tokens for case in batches.cases] == [42, 13, 27]
    assert [one.name for one in models] == ["stock float32", "patched float32"]
    agreement = found["first"]["patched float32"]
    assert 0 < agreement["difference"] < 1e-4
    assert agreement["changed"] == (None if labels is None else 0)
    assert agreement["labels"] == (labels or 0)
    assert sum(found["calls"].values()) == 2 * 3  # layers x batches: the patched model ran through the kernels
    assert found["fallbacks"] == {}
    for clock in ("wall", "cpu"):
        assert all(len(times) == 3 and min(times) > 0 for times in found[clock].values())


def test_several_dtypes_are_compared_with_the_first_and_with_their_own(save):
    *_, found = timed(save("DebertaV2ForSequenceClassification"), (torch.float32, torch.bfloat16))
    stock, patched = found["first"]["stock bfloat16"], found["first"]["patched bfloat16"]
    assert 1e-4 < patched["difference"] < 10 * stock["difference"]
    assert found["stock"]["stock bfloat16"]["difference"] == 0
    assert found["stock"]["patched bfloat16"]["difference"] > 0


def test_sorted_texts_come_longest_first(save):
    _, batches, *_ = timed(save("DebertaV2Model"), by_length=True)
    assert [case.tokens for case in batches.cases] == [42, 13, 5]


def test_long_texts_are_cut_and_counted(save):
    loaded = checkpoint.load(str(save("DebertaV2Model")), torch.float32)
    batches = encode(loaded, TEXTS, 8, 27, False)
    assert (batches.longest, batches.cut) == (27, 1)


def test_labels_that_change_are_counted():
    case = Case("", torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    logits = torch.tensor([[[1.0, 0], [0, 1], [9, 0]], [[1, 0], [0, 9], [0, 9]]])
    other = logits.clone()
    other[0, 1, 0] = 3.0  # a real token
    other[1, 2, 0] = 50.0  # padding
    agreement = Agreement()
    agreement.add(answers_of({"logits": logits}, case, False), answers_of({"logits": other}, case, False))
    assert (agreement.changed, agreement.labels, agreement.difference) == (1, 3, 3.0)


def test_a_text_may_have_several_labels():
    case = Case("", torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))
    logits = torch.tensor([[1.0, -0.1, 3.0]])
    found = [answers_of({"logits": x}, case, True) for x in (logits, logits + 0.2)]
    agreement = Agreement()
    agreement.add(*found)
    assert (agreement.changed, agreement.labels) == (1, 3)


def test_an_answer_that_is_no_number_is_no_agreement():
    agreement = Agreement()
    agreement.add(Answers({"x": torch.ones(2)}, None), Answers({"x": torch.tensor([1.0, torch.nan])}, None))
    agreement.add(Answers({"x": torch.ones(2)}, None), Answers({"x": torch.ones(2)}, None))
    assert agreement.difference != agreement.difference


def test_weights_that_are_not_in_the_checkpoint_are_told_of(save):
    folder = save("DebertaV2Model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(settings | {"architectures": ["DebertaV2ForSequenceClassification"]})
    )
    loaded = checkpoint.load(str(folder), torch.float32)
    assert "weights are not in the checkpoint and random, such as classifier.bias" in loaded.remarks[0]
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": ["DebertaV2ForSomethingElse"]}))
    loaded = checkpoint.load(str(folder), torch.float32)
    assert type(loaded.model).__name__ == "DebertaV2Model"
    assert "transformers has no class DebertaV2ForSomethingElse" in loaded.remarks[0]


def bench(*arguments, cwd):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    state = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "deberta_kernels", "bench", *map(str, arguments)],
        cwd=cwd, env=state, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.skipif(not LINUX, reason="memory is measured through /proc")
def test_the_command_prints_a_table_and_writes_numbers_and_picture(save, tmp_path):
    folder = save("DebertaV2ForSequenceClassification", num_labels=2)
    texts = tmp_path / "texts.csv"
    texts.write_text("id,text\n" + "".join(f"{number},{text}\n" for number, text in enumerate(TEXTS)))
    options = ["--dtype", "float32", "bfloat16", "--batch-size", 2, "--limit", 4, "--threads", 1, "--sort"]
    done = bench("--model", folder, "--text", texts, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = ["stock float32", "patched float32", "stock bfloat16", "patched bfloat16"]
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[4:8]] == names
    assert lines[5].endswith("0 of 4")
    assert "DebertaV2ForSequenceClassification; first 4 texts of texts.csv, column text" in done.stderr
    assert "sorted by length" in done.stdout
    assert "batch 2 of 2" in done.stderr
    written = json.loads((tmp_path / "bench-results" / "bench.json").read_text())
    assert [record["model"] for record in written["models"]] == names
    for record in written["models"]:
        assert record["texts_per_second"] > 0
        assert record["bytes"] >= 0
        assert record["median_seconds"] <= record["p95_seconds"]
    drawn = {path.name for path in (tmp_path / "bench-results").iterdir()}
    assert drawn == {"bench.json", "bench.png"} or "matplotlib is not installed" in done.stdout


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture
def refused(texts, capsys, monkeypatch):
    """Run the command, which must end with a message of one line before anything is measured."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(command, "measure", None)

    def refused(model, *options, file=texts):
        assert main(["bench", "--model", str(model), "--text", str(file), *map(str, options)]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("deberta-kernels bench: ")
        return lines[-1].removeprefix("deberta-kernels bench: ")

    return refused


def test_what_is_no_model_is_refused_by_name(refused, tmp_path, texts):
    assert "there is no such directory" in refused("/no/such/dir")
    assert "is a file; give the directory that it is in" in refused(texts)
    assert f"model directory {tmp_path} has no config.json" in refused(tmp_path)
    assert "the hub has no such model" in refused("somebody/deberta") or "HF_HUB_OFFLINE" in refused("somebody/deberta")


def test_a_model_that_is_no_deberta_is_refused(refused, tmp_path, monkeypatch):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    assert "model_type must be 'deberta' or 'deberta-v2', got 'bert'" in refused(tmp_path / "bert")
    monkeypatch.setattr(command, "check_model", lambda name: None)  # the hub's configuration is looked at later
    expected = "--model must be a DeBERTa (model_type deberta or deberta-v2), got model_type bert."
    assert refused(tmp_path / "bert") == expected


def test_a_tokenizer_that_is_missing_or_does_not_fit_is_named(refused, save):
    folder = save("DebertaV2Model")
    word_tokenizer([f"other{number}" for number in range(60)], longest=64).save_pretrained(folder)
    assert "the tokenizer knows no word of the texts" in refused(folder)
    word_tokenizer([*(f"other{number}" for number in range(900)), *WORDS], longest=64).save_pretrained(folder)
    assert "must fit the model's vocabulary of" in refused(folder)
    (folder / "tokenizer.json").write_text("{")
    assert "its tokenizer does not load: " in refused(folder)


def test_weights_that_do_not_load_are_named(refused, save):
    folder = save("DebertaV2Model")
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert f"--model {folder}: the model does not load: " in refused(folder)


def test_options_are_checked_before_any_work(refused, save, tmp_path, texts, monkeypatch):
    folder = save("DebertaV2Model", position_biased_input=True)
    assert "--max-length must be at most" in refused(folder, "--max-length", 100_000)
    assert f"{texts} is a file; name another folder" in refused(folder, "--output", texts / "results")
    assert "nowhere.txt cannot be read" in refused(folder, file=tmp_path / "nowhere.txt")
    monkeypatch.setattr(command, "missing_package", lambda *names: f"{names[0]} is not installed; run `pip install x`")
    assert refused(folder) == "transformers is not installed; run `pip install x`"


def test_a_measurement_that_failed_is_told_in_one_line(refused, save, tmp_path, monkeypatch):
    def fail(*arguments):
        raise MeasurementError("Traceback (most recent call last):\n  File ...\nMemoryError: no room")

    monkeypatch.setattr(command, "measure", fail)
    message = refused(save("DebertaV2Model"), "--output", tmp_path / "out")
    assert message == "not measured: MemoryError: no room; try a smaller --batch-size."
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--batch-size", "0"], "argument --batch-size: must be an integer from 1 to"),
        (["--max-length", "2"], "argument --max-length: must be 3 tokens or more, got '2'"),
        (["--length", "9"], "unrecognized arguments: --length 9"),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--model", "m", "--text", "t", *options])
    assert message in capsys.readouterr().err


def test_a_text_needs_a_model(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--text", "t"])
    assert "the following arguments are required: --model" in capsys.readouterr().err


def test_help_explains_both_benchmarks(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for word in ("--text", "--column", "Without --model the attention core", "--lengths", "python -m benchmarks core"):
        assert word in said


def test_without_a_model_the_attention_core_is_timed(monkeypatch):
    given = []
    monkeypatch.setattr(subprocess, "run", lambda words, **rest: given.append(words) or done)
    done = subprocess.CompletedProcess([], 0)
    assert main(["bench", "--quick"]) == 0
    assert given[0][1:] == ["-m", "benchmarks", "core", "--quick"]


def test_progress_tells_the_time_left(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 30.0, 31.0, 50.0])
    monkeypatch.setattr("deberta_kernels.bench.command.time.perf_counter", lambda: next(clock))
    progress = command.Progress()
    progress(0.0, "memory")
    progress(0.25, "batch 1 of 4")
    progress(0.3, "batch 2 of 4")  # a second later: nothing
    progress(1.0, "batch 4 of 4")
    said = capsys.readouterr().err.splitlines()
    assert said == ["[bench] memory", "[bench] batch 1 of 4, about 60 s left", "[bench] batch 4 of 4"]


def test_the_95th_percentile_leaves_one_in_twenty_above():
    assert show.high_percentile([3.0]) == 3.0
    assert show.high_percentile(range(19)) == 18
    assert show.high_percentile(range(100)) == 94


def test_patched_models_leave_the_stock_ones_as_they_are(save):
    _, _, models, _ = timed(save("DebertaV2Model"))
    assert dk.unpatch(models[0].model) == 0
    assert dk.unpatch(models[1].model) > 0
    assert models[0].model.embeddings.word_embeddings.weight is models[1].model.embeddings.word_embeddings.weight


@pytest.mark.packages("matplotlib")
def test_a_picture_says_what_was_gained(tmp_path):
    needs.package("matplotlib")
    from deberta_kernels.demo.picture import PATCHED, STOCK, Bar, Panel, figure_of, gain
    from deberta_kernels.demo.results import write_picture

    bars = [Bar(120.0, STOCK), Bar(12.0, PATCHED, gain(120.0, 12.0, "faster")), Bar(None, PATCHED)]
    panels = [Panel("time, ms", {"8 texts": bars}), Panel("rate", {"8 texts": bars}, logarithmic=False)]
    figure = figure_of("Ten times", "some processor", panels)
    said = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert [text.strip() for text in said] == ["120", "12", "10.0x faster", "120", "12 (10.0x faster)"]
    assert write_picture(tmp_path / "made" / "a.png", figure).stat().st_size > 1000
    assert [path.name for path in Path(tmp_path / "made").iterdir()] == ["a.png"]


def test_half_a_result_is_never_left(tmp_path):
    from deberta_kernels.demo.results import place

    def fail(beside):
        beside.write_text("half")
        raise RuntimeError("the disk is full")

    (tmp_path / "a.json").write_text("old")
    with pytest.raises(RuntimeError, match="the disk is full"):
        place(tmp_path / "a.json", fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]
