"""Stored results: where they go, and the tables, sections and pictures made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.harness import record as recording
from benchmarks.harness import tables
from benchmarks.harness.process import RESULTS
from benchmarks.registry import MODEL_SHAPES
from tests import needs
from tests.benchmarks.results import record, result, samples

RAGGED = next(shape for shape in MODEL_SHAPES if shape.fill < 1.0)
STORED = sorted(RESULTS.glob("*/*.json"))


def test_a_result_is_stored_by_kind_date_commit_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    made = result([record(RAGGED, {"eager": 6.0, "patched": 1.0, "padded": 2.0, "bert": 2.0})])
    recording.store(made, "")
    path = tmp_path / "some-processor" / "model-2026-01-02-030405-01234567.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert tables.kind_of(stored) == "model"
    assert stored["figures"]
    recording.store(made, "-")
    assert len(list(tmp_path.rglob("*.json"))) == 1
    made["settings"] |= {"threads": 4, "isa": "avx2"}
    recording.store(made, "")
    assert path.with_stem(path.stem + "-avx2-4threads").exists()


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_committed_result_can_be_shown(path: Path) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    text, markdown = (report.render(stored, text=flag) for flag in (True, False))
    assert stored["versions"]["torch"] in text
    assert stored["versions"]["torch"] in markdown
    for figure in stored.get("figures", []):
        if figure["median"] is not None:
            assert figure["case"] in text
            assert figure["title"] in markdown


def test_the_newest_whole_result_on_one_thread_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for day, changes in (
        (1, {}), (2, {"threads": 1}), (3, {"quick": True}), (4, {"threads": 2}), (5, {"threads": 2, "quick": True}),
        (6, {"only": ["float32"]}),
    ):  # fmt: skip
        made = result([], date=f"2026-01-0{day}T00:00:00+00:00")
        made["settings"] |= changes
        path = tmp_path / "device" / f"model-2026-01-0{day}-000000-01234567.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(made), encoding="utf-8")
    assert [report.newest("model", threads)["date"][9] for threads in (1, 2)] == ["2", "4"]
    assert report.newest("cpu") is None


def test_sections_and_pictures_of_a_document_are_written_anew(tmp_path: Path) -> None:
    needs.package("matplotlib")
    records = [record(shape, {"eager": 6.0, "patched": 1.0, "bert": 2.0}) for shape in MODEL_SHAPES]
    records[0]["samples"]["onnxruntime"] = samples(3.0)
    peaks = [{**RAGGED.__dict__, "label": RAGGED.label, "bytes": {"eager": 5e6, "patched": "error"}}]
    path, readme, picture = tmp_path / "model.json", tmp_path / "README.md", tmp_path / "model.png"
    path.write_text(json.dumps(result(records, peaks=peaks)), encoding="utf-8")
    shown = "before\n![x](images/model.png)\n<!-- bench-model:begin -->\nold\n<!-- bench-model:end -->\nafter\n"
    readme.write_text(shown, encoding="utf-8")
    assert report.main([str(path), "--plot", str(picture), "--update", str(readme)]) == 0
    content = readme.read_text(encoding="utf-8")
    assert content.startswith("before\n")
    assert content.endswith("after\n")
    assert "old" not in content
    assert "| 8x128 60% full float32 | 5 | failed |" in content
    assert picture.stat().st_size > 0
    assert (tmp_path / "images" / "model.png").stat().st_size > 0


def test_a_whole_result_is_preferred_to_an_interrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for day, complete in ((1, True), (2, False)):
        made = result([], date=f"2026-01-0{day}T00:00:00+00:00", complete=complete)
        path = tmp_path / "device" / f"model-2026-01-0{day}-000000-01234567.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(made), encoding="utf-8")
    found = report.newest("model")
    assert found is not None
    assert found["date"][9] == "1"


def test_a_processor_is_named_as_people_do_with_its_cores() -> None:
    made = result([])
    made["machine"] |= {"processor": "AMD EPYC", "family": "25", "model": "17", "stepping": "1"}
    assert tables.conditions(made).startswith("one core of AMD EPYC 9004 (Zen 4), process CPU time; ")
    made["settings"]["threads"] = 4
    assert tables.cores(made) == "4 cores of AMD EPYC 9004 (Zen 4)"


def test_a_patched_model_takes_less_time_than_tensorflow() -> None:
    found = report.newest("tensorflow")
    assert found is not None
    assert found["moved"]
    for moved in found["moved"]:  # docs/tensorflow.md says so
        times = {name: sample["median"] for name, sample in moved["samples"].items()}
        assert times["patched"] < min(times["graph"], times["xla"]), moved["label"]


def test_a_document_without_a_section_is_refused_by_name(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README.md must contain <!-- bench-cpu:begin --> and the same with end"):
        report.update(readme, {"cpu": result([], kind="cpu")})
    with pytest.raises(ValueError, match="must contain the lines <!-- x:begin --> and <!-- x:end -->"):
        tables.replace_section(readme, "x", [])


def test_memory_of_training_is_shown_computed_and_measured() -> None:
    way = {"model": "v3-base", "length": 512, "checkpointing": False}
    training = [
        {**way, "patched": False, "computed": 4.25e9, "measured": 5.4e9},
        {**way, "patched": True, "computed": 3.25e9, "measured": None},
    ]
    kept = [{"length": 512, "eager": 80 * 2**20, "patched": 12 * 2**20}]
    made = result([], kind="training_memory", attention=kept, training=training, figures=[])
    shown = report.render(made, text=False)
    assert "| 512 | 80 | 12.0 | 15.0% | ≤ 25% | ≤ 15% |" in shown
    assert "| v3-base | 512 | 4.2 / 5.4 | 3.2 / - |" in shown
    assert "commit 01234567" in shown
