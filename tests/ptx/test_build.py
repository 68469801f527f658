"""Building the machine."""

import pytest
from ptx import build


def test_without_a_compiler_it_says_what_to_do(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.NoCompiler, match=r"there is no no-such-compiler; install g\+\+ or set CXX"):
        build.compiler()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_BUILD", tmp_path)
    monkeypatch.setattr(build, "_FLAGS", ("-no-such-flag",))
    with pytest.raises(RuntimeError, match=r"the PTX machine does not compile:[^$]*no-such-flag"):
        build.library.__wrapped__()


def test_every_case_has_a_number_of_its_own():
    lines = [line for line in build.cases().split("\n") if line.startswith(("EACH(", "CASE("))]
    assert len({line.split("(")[1].split(",")[0] for line in lines}) == len(lines) > 200
