"""Choosing tile sizes: when the default stays, and what the table holds."""

import json

import pytest

from benchmarks.gpu import tune


def test_the_default_stays_unless_another_is_clearly_faster():
    assert tune.fastest({"default": [1.0, 1.0], "other": [0.99, 0.99]}, "default") == "default"
    assert tune.fastest({"default": [1.0, 1.0], "other": [0.5, 1.5]}, "default") == "other"
    assert tune.fastest({"default": [1.0, 1.0], "other": [0.9, 1.2]}, "default") == "default"
    assert tune.fastest({"other": [2.0]}, "default") == "other"


def entry(dim, tile):
    return {"dtype": "bfloat16", "head_dim": dim, "direction": "forward", "tile": tile, "num_warps": 4, "num_stages": 2}


def test_the_table_keeps_what_is_not_measured_again(tmp_path):
    path = tmp_path / "configs" / "sm_90.json"
    for found in (entry(64, 64), entry(128, 32), entry(64, 32)):
        tune.store(path, found, {"date": "today", "shapes": tune.SHAPES})
    table = json.loads(path.read_text())
    assert table["date"] == "today"
    assert [(row["head_dim"], row["tile"]) for row in table["entries"]] == [(64, 32), (128, 32)]


def test_entries_follow_the_command_line():
    wanted = tune.entries(tune.parse(["--dtypes", "float16", "--dims", "32,64", "--directions", "backward"]))
    assert wanted == [("float16", 32, "backward"), ("float16", 64, "backward")]
    assert len(tune.entries(tune.parse([]))) == len(tune.DTYPES) * len(tune.DIMS) * 2


def test_without_a_gpu_it_says_what_to_do(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main([]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_an_entry_without_a_candidate_that_works_keeps_the_reasons(monkeypatch):
    monkeypatch.setattr(tune, "fault", lambda *_: "wrong")
    found = tune.measure(tune.parse(["--device", "cpu"]), ("float16", 16, "forward"), "sm_90")
    assert set(found["failed"].values()) == {"wrong"}
    assert "tile" not in found


@pytest.mark.parametrize(
    ("error", "status"), [(None, 0), ("OutOfResources", 0), ("PTXASError", 1), ("a wrong answer", 1)], ids=str
)
def test_a_candidate_that_fails_shows_in_the_status_and_one_too_large_does_not(
    monkeypatch, tmp_path, capsys, error, status
):
    calls = []

    def fault(*_):
        calls.append(error)
        if error is None or len(calls) > 1:
            return ""
        if error == "a wrong answer":
            return "dq: wrong"
        raise type(error, (RuntimeError,), {})("told")

    monkeypatch.setattr(tune, "fault", fault)
    monkeypatch.setattr(tune, "planned", lambda *_: ([], {}))
    monkeypatch.setattr(tune, "problem", lambda *_: None)
    monkeypatch.setattr(tune, "run_all", lambda _: sum(range(1000)))
    path = tmp_path / "table.json"
    assert tune.main(["--device", "cpu", "--directions", "forward", "--output", str(path)]) == status
    assert ("FAILED" in capsys.readouterr().out) == bool(status)
    assert json.loads(path.read_text())["entries"][0]["tile"]
