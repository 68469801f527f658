"""Real texts: how they are cut and laid out, who is wrong, and tokens per second."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import tables, throughput
from benchmarks.harness.clock import Pace, interleave
from benchmarks.model.batches import Batch
from benchmarks.model.rivals import Models
from benchmarks.registry import CANDIDATES, ROUGH, TEXTS, Texts
from benchmarks.texts import rivals, run
from benchmarks.texts.collection import collect, padded
from deberta_kernels.demo.text import CLS, PAD, SEP, hashing_encoder
from tests.benchmarks.results import texts_record, texts_result

ENCODE = hashing_encoder(1024)


@pytest.mark.parametrize("texts", TEXTS, ids=lambda texts: texts.name)
def test_texts_are_as_long_as_a_case_says(texts: Texts) -> None:
    collection = collect(texts, ENCODE)
    assert len(collection.arriving) == len(collection.by_length) == texts.batches
    for batch in collection.arriving:
        lengths = batch.attention_mask.sum(1).tolist()
        assert len(lengths) == texts.batch
        passages = [length for length in lengths if length > texts.sentence]
        assert len(passages) == texts.long
        assert all(0.75 * texts.longest < length <= texts.longest for length in passages)
        assert len(set(lengths)) > texts.batch // 2  # ragged, as texts are


def test_a_batch_is_padded_on_the_right_and_begins_and_ends_as_a_tokenizer_makes_it() -> None:
    batch = padded([[CLS, 7, 8, 9, SEP], [CLS, 7, SEP]])
    assert batch.input_ids.tolist() == [[CLS, 7, 8, 9, SEP], [CLS, 7, SEP, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    first = collect(TEXTS[0], ENCODE).arriving[0]
    for row, mask in zip(first.input_ids, first.attention_mask, strict=True):
        real = row[mask.bool()]
        assert (int(real[0]), int(real[-1])) == (CLS, SEP)


def test_sorting_changes_the_order_alone() -> None:
    collection = collect(TEXTS[0], ENCODE)

    def rows(batches: list[Batch]) -> list[list[int]]:
        pairs = [pair for batch in batches for pair in zip(batch.input_ids, batch.attention_mask, strict=True)]
        return [row[mask.bool()].tolist() for row, mask in pairs]

    arriving, ordered = rows(collection.arriving), rows(collection.by_length)
    assert sorted(arriving) == sorted(ordered)
    lengths = [len(row) for row in ordered]
    assert lengths == sorted(lengths, reverse=True)
    assert sum(x.input_ids.numel() for x in collection.by_length) < sum(
        x.input_ids.numel() for x in collection.arriving
    )


def test_calls_that_ran_before_are_timed_from_the_first_on() -> None:
    calls: list[int] = []
    samples = interleave({"only": calls.append}, Pace(rounds=3, least=3, seconds=0.0, block=0.0))
    assert len(calls) == samples["only"].rounds == 3
    assert samples["only"].inner == 1


def test_a_rate_is_of_the_tokens_that_a_candidate_read() -> None:
    record = texts_record("mixed", {"eager": 10.0, "sorted": 25.0})
    assert throughput.rate(record, "sorted") == pytest.approx(25.0)
    assert throughput.times_eager(record, "sorted") == pytest.approx(2.5)


def test_wrong_and_missing_candidates_are_words_in_the_table_and_lost_ones_stay() -> None:
    made = texts_result()
    for record in made["texts"]:
        del record["samples"]["openvino"], record["samples"]["onnxruntime"]
        record["checks"] = {"openvino": {"ok": False, "text": "far"}, "patched-int8": {"ok": True, "error_share": 0.04}}
        record["missing"] = {"onnxruntime": "not installed: onnxruntime"}
    rows = {row[0]: row[1:] for row in throughput.rows(made)}
    assert rows["OpenVINO"][0] == "wrong"
    assert rows["ONNX Runtime"][0] == "missing"
    assert rows["patched, int8"] == ["70", "7.0", "35", "3.5", "4.0%"]
    assert list(rows)[1:] == [
        x.heading + (", another model" if name in ("bert", "modernbert") else "")
        for name, x in CANDIDATES["texts"].items()
    ]
    assert "onnxruntime: not installed" in tables.text(made)


def _batches() -> tuple[list[Batch], list[Tensor]]:
    batch = padded([[CLS, 7, 8, SEP], [CLS, SEP]])
    return [batch], [torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))]


def test_a_less_exact_dtype_may_be_rough_and_not_wrong() -> None:
    batches, eager = _batches()
    padding = torch.zeros(2, 4, 3)
    padding[1, 2:] = 100.0
    near = run.rough_check(lambda _: eager[0] * 1.01 + padding, batches, eager, ROUGH["bfloat16"])
    assert near["ok"]
    assert near["error_share"] == pytest.approx(0.01, rel=1e-3)
    assert not run.rough_check(lambda _: eager[0].flip(0), batches, eager, ROUGH["int8"])["ok"]
    nothing = run.rough_check(lambda _: eager[0] * float("nan"), batches, eager, ROUGH["int8"])
    assert not nothing["ok"]
    assert nothing["error_share"] is None

    def broken(_: Batch) -> Tensor:
        raise RuntimeError("no such kernel")

    assert "no such kernel" in run.rough_check(broken, batches, eager, 1.0)["text"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """Return the directory of a tiny DeBERTa without a tokenizer."""
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=32, max_relative_positions=-1,
        share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0,
    )  # fmt: skip
    DebertaV2Model(config).eval().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_a_run_proves_times_and_stores_every_candidate(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = rivals.build

    def build(name: str, models: Models) -> Any:
        if name == "openvino":  # another model's answers, at once
            return lambda batch: torch.zeros(*batch.input_ids.shape, 32)
        return built("bert" if name == "modernbert" else name, models)  # its published size takes seconds

    monkeypatch.setattr(run, "build", build)
    monkeypatch.setattr(rivals.Models, "exported", lambda self: (_ for _ in ()).throw(OSError("no export here")))
    rows = CANDIDATES["texts"]
    needless = {name: type(x)(**{**x.__dict__, "needs": ()}) for name, x in rows.items()}
    monkeypatch.setitem(CANDIDATES, "texts", needless)
    path = tmp_path / "texts.json"
    assert run.main([checkpoint, "--quick", "--backend", "torch", "--json", str(path)]) == 0
    stored = json.loads(path.read_text(encoding="utf-8"))
    (record,) = stored["texts"]
    assert record["name"] == "sentences"
    assert set(record["samples"]) == set(rows) - {"onnxruntime", "onnxruntime-int8", "openvino"}
    assert not record["checks"]["openvino"]["ok"]
    assert record["checks"]["patched"]["ok"]
    assert 0 < record["checks"]["patched-bfloat16"]["error_share"] < ROUGH["bfloat16"]
    assert 0 < record["checks"]["patched-int8"]["error_share"] < ROUGH["int8"]
    assert "no export here" in record["missing"]["onnxruntime"]
    assert record["tokens"]["sorted"] > record["tokens"]["eager"] == record["tokens"]["patched"]
    assert "wrong" in capsys.readouterr().out


def test_a_wrong_answer_of_ours_is_an_exit_status(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = rivals.build
    monkeypatch.setattr(
        run,
        "CANDIDATES",
        {"texts": {name: x for name, x in CANDIDATES["texts"].items() if name in ("eager", "patched")}},
    )
    monkeypatch.setattr(
        run, "build", lambda name, models: built(name, models) if name == "eager" else lambda batch: torch.zeros(1)
    )
    assert run.main([checkpoint, "--quick", "--backend", "torch", "--json", "-"]) == 1


def test_the_error_of_int8_is_shown_and_no_fault_of_ours(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {name: x for name, x in CANDIDATES["texts"].items() if name in ("eager", "patched", "patched-int8")}
    monkeypatch.setitem(CANDIDATES, "texts", rows)
    monkeypatch.setitem(ROUGH, "int8", 0.0)
    assert run.main([checkpoint, "--quick", "--backend", "torch", "--json", "-"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("patched, int8"))
    assert line.split()[2] == "wrong"
    assert line.endswith("%")


def test_the_int8_file_is_written_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = tmp_path / "model.onnx"
    exported.write_text("weights", encoding="utf-8")

    def quantize(source: str, target: str, **_: Any) -> None:
        Path(target).write_text("half", encoding="utf-8")
        raise RuntimeError("disk full")

    # In the place of ONNX Runtime's, which an environment of the tests need not have.
    module = types.ModuleType("onnxruntime.quantization")
    vars(module).update(quantize_dynamic=quantize, QuantType=types.SimpleNamespace(QInt8=1))
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", module)
    with pytest.raises(RuntimeError, match="disk full"):
        rivals.quantised_file(exported)
    assert not exported.with_suffix(".int8.onnx").exists()
    vars(module)["quantize_dynamic"] = lambda source, target, **_: Path(target).write_text("whole", encoding="utf-8")
    assert rivals.quantised_file(exported).read_text(encoding="utf-8") == "whole"
    vars(module)["quantize_dynamic"] = quantize
    assert rivals.quantised_file(exported).read_text(encoding="utf-8") == "whole"
