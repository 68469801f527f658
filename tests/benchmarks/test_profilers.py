"""Reading what compute-sanitizer and Nsight Compute say, from stand-ins for both."""

import stat

import pytest

from benchmarks.core import rivals
from benchmarks.gpu import profilers
from benchmarks.gpu.plan import Plan


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Put a program of some name first on PATH that prints its arguments and a text, and ends with a status."""

    def install(name, text, status=0):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho \"arguments: $*\"\ncat <<'END'\n{text}\nEND\nexit {status}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return install


def found(items):
    assert items
    return [item.run() for item in items]


def test_a_clean_run_is_fine_and_its_summary_kept(tool):
    tool("compute-sanitizer", "ran 6 cases of triton\n========= ERROR SUMMARY: 0 errors")
    for result in found(profilers.sanitizer_items(Plan())):
        assert result["ok"]
        assert result["summary"] == ["========= ERROR SUMMARY: 0 errors"]
        assert result["ran"] == ["ran 6 cases of triton"]


def test_errors_and_a_run_that_did_not_end_are_failures(tool):
    tool("compute-sanitizer", "ran 6 cases of triton\nInvalid __global__ read\nERROR SUMMARY: 1 error", profilers.FOUND)
    for result in found(profilers.sanitizer_items(Plan())):
        assert not result["ok"]
        assert "Invalid __global__ read" in result["text"]
        assert "--kernel-name kns=disentangled" in result["text"]
    tool("compute-sanitizer", "ERROR SUMMARY: 0 errors")
    assert not any(result["ok"] for result in found(profilers.sanitizer_items(Plan())))


HAZARD = """========= ERROR: Potential {kind} hazard detected at __shared__ 0x{address:x} in block (0,0,0) :
========= Write Thread (0,0,0) at _disentangled_fwd_kernel+0x2f0
========= Write Thread (32,0,0) at _disentangled_fwd_kernel+0x2f0
========= Current Value : {current}, Incoming Value : {incoming}{more}
"""


def hazard(kind="WAW", current="63", incoming="63", address=0, more=""):
    return HAZARD.format(kind=kind, current=current, incoming=incoming, address=address, more=more)


def test_warps_that_store_one_value_are_told_apart_from_races():
    text = hazard() + hazard(address=1, current="0", incoming="0")
    assert profilers.hazards(text) == (2, [])
    races = [
        hazard(incoming="64"),
        hazard("RAW"),
        hazard("WAR"),
        hazard(more=" (invalid memcpy_async synchronization)"),
        "========= WARNING: Potential WAW hazard detected at __shared__ 0x0 in block (0,0,0) :\n",
    ]
    for race in races:
        equal, others = profilers.hazards(hazard() + race + hazard())
        assert (equal, len(others)) == (2, 1), race


@pytest.mark.parametrize(
    ("text", "displayed", "status", "ok"),
    [
        (hazard(), 1, profilers.FOUND, True),
        (hazard(), 2, profilers.FOUND, False),  # one that was not understood
        (hazard() + hazard("RAW"), 2, profilers.FOUND, False),
        (hazard("RAW"), 1, 0, False),
        (hazard(), 1, 1, False),
    ],
)
def test_racecheck_passes_with_equal_writes_alone(tool, text, displayed, status, ok):
    summary = f"========= RACECHECK SUMMARY: {displayed} hazards displayed ({displayed} errors, 0 warnings)"
    tool("compute-sanitizer", f"ran 6 cases of triton\n{text}{summary}", status)
    _, result = found(profilers.sanitizer_items(Plan()))
    assert result["ok"] is ok
    assert result["equal_writes"] == text.count("WAW")


def test_a_backend_of_which_no_case_ran_is_a_failure(tool, monkeypatch):
    monkeypatch.setattr(profilers, "asked", lambda plan: ("triton", "cuda"))
    for text, ok in (
        ("ran 6 cases of triton", False),
        ("ran 6 cases of triton\nran 0 cases of cuda", False),
        ("ran 6 cases of triton\nran 4 cases of cuda", True),
    ):
        tool("compute-sanitizer", text)
        for result in found(profilers.sanitizer_items(Plan())):
            assert result["ok"] is ok
            assert ("no case of cuda ran" in result["text"]) is not ok


def test_the_watched_problems_run_on_every_backend_that_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(profilers, "asked", lambda plan: ("torch", "reference"))
    assert profilers.run_small(Plan(device="cpu", backend="torch")) == 0
    assert capsys.readouterr().out == "ran 6 cases of torch\nran 6 cases of reference\n"
    monkeypatch.setattr(profilers, "asked", lambda plan: ("cuda",))
    with pytest.raises(NotImplementedError, match="backend='cuda' cannot run this call"):
        profilers.run_small(Plan(device="cpu", backend="torch"))


def test_a_machine_that_does_not_let_it_work_is_no_failure(tool):
    tool("compute-sanitizer", "Error: Device not supported", 1)
    assert all("Device not supported" in result["skipped"] for result in found(profilers.sanitizer_items(Plan())))
    tool("ncu", "==ERROR== ERR_NVGPUCTRPERM", 1)
    assert all("reads no counters" in result["skipped"] for result in found(profilers.counter_items(Plan())))


def test_counters_are_kept_as_text(tool):
    tool("ncu", "bank conflicts 12")
    for result in found(profilers.counter_items(Plan())):
        assert result["ok"]
        assert "bank conflicts 12" in result["report"]


def test_without_the_tools_it_says_so(monkeypatch):
    monkeypatch.setattr(profilers.shutil, "which", lambda name: None)
    results = found([*profilers.sanitizer_items(Plan()), *profilers.counter_items(Plan())])
    assert [result["skipped"] for result in results] == ["no compute-sanitizer on PATH"] * 2 + ["no ncu on PATH"] * 2


def test_only_the_release_of_a_rival_that_was_read_is_called(monkeypatch):
    def version(name):
        if name == "flashdeberta":
            return "0.1.0"
        raise rivals.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(rivals.importlib.metadata, "version", version)
    assert rivals.available("flashdeberta") == "version 0.1.0 is installed, 0.0.8 was read"
    assert rivals.available("disentangled-flash") == "not installed"
