"""Building the machine."""

import subprocess
import sys
from pathlib import Path

import pytest
from ptx import build

from deberta_kernels.impl.cuda import nvrtc
from tests import needs

TOOLS = str(Path(build.__file__).resolve().parents[1])
# Two of these at once must make one file.
MAKE = """
import pathlib, sys, time
from ptx import build

def make(target):
    with open(sys.argv[1] + "/log", "a") as log:
        log.write("made ")
    time.sleep(0.3)
    target.write_text("done")

build._BUILD = pathlib.Path(sys.argv[1]) / "ptx"
print(build.made_once("thing", make).read_text())
"""


def test_without_a_compiler_it_says_what_to_do(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.NoCompiler, match=r"there is no no-such-compiler; install g\+\+ or set CXX"):
        build.compiler()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_BUILD", tmp_path)
    monkeypatch.setattr(build, "_FLAGS", ("-no-such-flag",))
    with pytest.raises(RuntimeError, match=r"does not compile with .*; set CXX:[^$]*no-such-flag"):
        build.library.__wrapped__()


def test_every_case_has_a_number_of_its_own():
    lines = [line for line in build.cases().split("\n") if line.startswith(("EACH(", "CASE("))]
    assert len({line.split("(")[1].split(",")[0] for line in lines}) == len(lines) > 200


def test_a_compiler_may_come_with_options(monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -E '-D A'")
    assert build.compiler() == [sys.executable, "-E", "-D A"]
    monkeypatch.setenv("CXX", "")
    assert len(build.compiler()) == 1


@pytest.mark.parametrize("program", ["false", "true"])
def test_a_compiler_that_says_nothing_is_named(monkeypatch, tmp_path, program):
    """One fails without a word, the other returns 0 and has written nothing."""
    monkeypatch.setattr(build, "_BUILD", tmp_path)
    monkeypatch.setenv("CXX", program)
    with pytest.raises(RuntimeError, match=rf"does not compile with \S*{program}; set CXX:\nit returned \d and said"):
        build.library.__wrapped__()
    assert not list(tmp_path.glob("*.so"))


def test_a_build_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(build, "_BUILD", tmp_path / "file" / "ptx")
    with pytest.raises(RuntimeError, match=r"thing is to be made in \S*file/ptx, which fails .*; let that folder be"):
        build.made_once("thing", Path.touch)


def test_what_is_there_needs_no_folder_to_write_in(monkeypatch, tmp_path):
    """As root may write anywhere, by the files: not even a lock is left."""
    (tmp_path / "thing").touch()
    monkeypatch.setattr(build, "_BUILD", tmp_path)
    assert build.made_once("thing", Path.unlink) == tmp_path / "thing"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_two_processes_make_a_file_once(tmp_path):
    command = [sys.executable, "-c", MAKE, str(tmp_path)]
    running = [
        subprocess.Popen(command, env={"PYTHONPATH": TOOLS}, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate()[0] for process in running] == ["done\n"] * 2
    assert (tmp_path / "log").read_text() == "made "


def test_without_a_compiler_the_header_says_so_and_a_required_one_is_missed(monkeypatch, request):
    monkeypatch.setattr(needs, "COMPILER", None)
    monkeypatch.setattr(needs, "required", set())
    header = request.config.pluginmanager.getplugin(str(Path(needs.__file__).with_name("conftest.py")))
    lines = header.pytest_report_header(request.config)
    found = [line for line in lines if "no C++ compiler" in line]
    assert len(found) == 1
    assert "the machine for PTX (" in found[0]
    needs.required.add("compiler")
    assert needs.machine_absence() is None  # the tests are collected, and fail


def test_without_a_cuda_compiler_the_header_counts_what_is_left_out_and_a_required_one_is_missed(monkeypatch, request):
    def fail():
        raise nvrtc.NvrtcError("none")

    monkeypatch.setenv("NVCC", "no-such-compiler")
    monkeypatch.setattr(nvrtc, "Compiler", fail)
    monkeypatch.setattr(needs, "required", set())
    header = request.config.pluginmanager.getplugin(str(Path(needs.__file__).with_name("conftest.py")))
    found = [line for line in header.pytest_report_header(request.config) if "no CUDA compiler" in line]
    count = len(list(Path(__file__).with_name("kernels").glob("test_cuda*.py")))
    assert len(found) == 1
    assert f"({count} files of tests/ptx/kernels)" in found[0]
    needs.required.add("cuda_compiler")
    assert needs.cuda_absence() is None
