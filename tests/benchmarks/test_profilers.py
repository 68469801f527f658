"""Reading what compute-sanitizer and Nsight Compute say, from stand-ins for both."""

import stat

import pytest

from benchmarks.gpu import profilers, rivals
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
    tool("compute-sanitizer", "ran 6 cases\n========= ERROR SUMMARY: 0 errors")
    for result in found(profilers.sanitizer_items(Plan())):
        assert result["ok"]
        assert result["summary"] == ["========= ERROR SUMMARY: 0 errors"]
        assert result["ran"] == ["ran 6 cases"]


def test_errors_and_a_run_that_did_not_end_are_failures(tool):
    tool("compute-sanitizer", "ran 6 cases\nInvalid __global__ read\nERROR SUMMARY: 1 error", profilers.FOUND)
    for result in found(profilers.sanitizer_items(Plan())):
        assert not result["ok"]
        assert "Invalid __global__ read" in result["text"]
        assert "--kernel-name kns=disentangled" in result["text"]
    tool("compute-sanitizer", "ERROR SUMMARY: 0 errors")
    assert not any(result["ok"] for result in found(profilers.sanitizer_items(Plan())))


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
