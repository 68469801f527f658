"""Running a stage in a process of its own: crashes, hangs and time limits cost one item each."""

import json
import sys

import pytest

from benchmarks.gpu import stages
from benchmarks.gpu.plan import Plan

WORKER = """
import argparse, os, pathlib, sys, time
sys.path.insert(0, {root!r})
from benchmarks.gpu.stages import Item, work
parser = argparse.ArgumentParser()
for name in ("--worker", "--plan", "--lines"):
    parser.add_argument(name)
parser.add_argument("--skip", action="append", default=[])
options = parser.parse_args()

def fail():
    raise ValueError("no good")

kinds = {{
    "fine": lambda: {{"ok": True, "name": "kept"}},
    "fails": fail,
    "poisons": fail,
    "crashes": lambda: os._exit(7),
    "hangs": lambda: time.sleep(60),
    "slow": lambda: time.sleep(1.0) or {{}},
}}
names = options.worker.split(",")
healthy = lambda: "poisons" not in names or "poisons" in options.skip
found = [Item(n, kinds[n.rstrip("2")]) for n in names]
sys.exit(work(found, pathlib.Path(options.lines), frozenset(options.skip), healthy))
"""


@pytest.fixture
def run(tmp_path, monkeypatch, request):
    root = request.config.rootpath
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(root)))
    monkeypatch.setattr(stages, "WORKER", [sys.executable, str(script)])
    monkeypatch.setattr(stages, "POLL", 0.05)

    def start(names, seconds=30.0, item_seconds=20.0):
        seen = []
        stage = stages.Stage(names, seconds, item_seconds)
        record = stages.supervise(stage, Plan(device="cpu"), seconds, lambda r: seen.append(len(r["items"])))
        return record, seen

    return start


def test_every_item_is_run_and_its_result_kept(run):
    record, seen = run("fine,fails,fine2")
    assert record["complete"]
    assert record["broken"] == ""
    assert record["items"]["fine"]["ok"] is True
    assert record["items"]["fine"]["name"] == "kept"
    assert record["items"]["fails"]["error"] == "ValueError: no good"
    assert "traceback" in record["items"]["fails"]
    assert seen[-1] == 3


@pytest.mark.parametrize("bad", ["crashes", "poisons"])
def test_a_crash_costs_one_item(run, bad):
    record, _ = run(f"fine,{bad},fine2")
    assert record["complete"]
    assert [record["items"][name]["ok"] for name in ("fine", bad, "fine2")] == [True, False, True]


def test_a_hang_costs_one_item(run):
    record, _ = run("fine,hangs,fine2", item_seconds=4.0)
    assert record["complete"]
    assert "took too long" in record["items"]["hangs"]["error"]
    assert record["items"]["fine2"]["ok"] is True


def test_a_stage_ends_at_its_limit_and_keeps_what_it_has(run):
    record, _ = run("fine,hangs,fine2", seconds=4.0)
    assert not record["complete"]
    assert record["broken"] == "stopped after 4 s"
    assert record["items"]["fine"]["ok"] is True
    assert record["items"]["hangs"]["unfinished"] is True
    assert "fine2" not in record["items"]


def test_a_worker_that_does_not_start_is_reported(run, monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no such module')")
    monkeypatch.setattr(stages, "WORKER", [sys.executable, str(broken)])
    record, _ = run("fine")
    assert not record["complete"]
    assert "no such module" in record["broken"]


def test_half_written_lines_are_left_out(tmp_path):
    path = tmp_path / "lines"
    path.write_text(json.dumps({"started": "a"}) + "\n" + json.dumps({"finished": "a", "result": {}}) + '\n{"sta')
    assert stages.read(path) == ({"a": {}}, "")
    assert stages.read(tmp_path / "none") == ({}, "")
