"""What the documents name is there: make targets, commands, environment variables, files, and names of the package."""

from __future__ import annotations

import argparse
import importlib.util
import re

import pytest

import deberta_kernels as dk
from deberta_kernels import __main__ as command_line
from deberta_kernels import env
from tests.checkout import ROOT
from tools.documentation import links

# What has been, not what is.
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in links.markdown_files(ROOT)
    if path.name != "CHANGELOG.md"
}
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
# Where the build looks at variables that are not in `env`, since the package is not there yet.
BUILD = "".join(
    path.read_text(encoding="utf-8")
    for path in (ROOT / "setup.py", ROOT / "Makefile", *(ROOT / "csrc").glob("*.py"), *(ROOT / "tools").glob("*.py"))
)
every_document = pytest.mark.parametrize("name", DOCUMENTS)


def code(text: str) -> list[str]:
    """The code of a document: the lines of its blocks, and the spans in its text."""
    found = []
    for line, is_text in links.prose(text):
        found += re.findall(r"`([^`]+)`", line) if is_text else [line.strip()]
    return found


def named(pattern: str, name: str) -> set[str]:
    """What a pattern's group finds at the beginning of the pieces of code of a document."""
    return {match[1] for piece in code(DOCUMENTS[name]) if (match := re.match(pattern, piece))}


def commands() -> set[str]:
    """The commands of `python -m deberta_kernels`."""
    actions = command_line.parser()._actions
    return {name for action in actions if isinstance(action, argparse._SubParsersAction) for name in action.choices}


@every_document
def test_make_targets_are_in_the_makefile(name):
    assert named(r"(?:[A-Z_]+=\S+ )*make ([a-z][a-z0-9-]*)", name) - TARGETS == set()


@every_document
def test_modules_that_are_run_are_there(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    modules = named(r"(?:[A-Z_]+=\S+ )*(?:python3?|\S+/python) -m ([\w.]+)", name)
    assert {module for module in modules if importlib.util.find_spec(module) is None} == set()


@every_document
def test_commands_of_the_package_are_there(name):
    assert (
        named(r"(?:[A-Z_]+=\S+ )*(?:python3? -m deberta_kernels|deberta-kernels) ([a-z]+)", name) - commands() == set()
    )


@every_document
def test_programs_and_files_are_there(name):
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0].isalpha())
    # No wildcards, no place-holders, nothing that a build makes.
    pattern = rf"(?:python3? )?((?:{folders})/[\w./-]+)(?=$|[ `#])"
    made = re.compile(r"(?:build|dist|site|deberta_kernels/lib)/")
    files = {path for path in named(pattern, name) if not made.match(path)}
    assert {path for path in files if not (ROOT / path).exists()} == set()


@every_document
def test_environment_variables_are_looked_at(name):
    variables = set(re.findall(r"\bDEBERTA_KERNELS_[A-Z0-9_]+\b", DOCUMENTS[name])) - set(env.VARIABLES)
    assert {variable for variable in variables if variable not in BUILD} == set()


@every_document
def test_names_of_the_package_are_there(name):
    names = {match for piece in code(DOCUMENTS[name]) for match in re.findall(r"\bdk\.(\w+)", piece)}
    assert {found for found in names if not hasattr(dk, found)} == set()


def test_every_variable_and_every_command_is_documented():
    everything = "\n".join(DOCUMENTS.values())
    assert {name for name in env.VARIABLES if f"`{name}`" not in DOCUMENTS["docs/environment.md"]} == set()
    assert {name for name in commands() if not re.search(rf"deberta[_-]kernels {name}\b", everything)} == set()


def test_make_variables_of_the_documents_are_in_the_makefile():
    table = DOCUMENTS["docs/environment.md"].partition("## Make variables")[2].partition("\n## ")[0]
    names = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`([A-Z0-9_]+)`", row)}
    assert len(names) > 8
    assert {name for name in names if not re.search(rf"\b{name}\b", BUILD)} == set()


def test_every_public_name_is_in_the_reference():
    reference = set(re.findall(r"^::: deberta_kernels\.(\w+)$", DOCUMENTS["docs/api.md"], re.M))
    assert {name for name in dk.__all__ if not name.startswith("__")} - reference == set()


def test_what_is_not_there_is_found(monkeypatch):
    def modules(name):
        test_modules_that_are_run_are_there(name, monkeypatch)

    text = (
        "```bash\npython -m no_module\npython tools/none.py\n```\n`make nothing`, `DEBERTA_KERNELS_NONE`, `dk.none`\n"
    )
    monkeypatch.setitem(DOCUMENTS, "made up", text)
    for test in (
        test_make_targets_are_in_the_makefile,
        modules,
        test_programs_and_files_are_there,
        test_environment_variables_are_looked_at,
        test_names_of_the_package_are_there,
    ):
        with pytest.raises(AssertionError):
            test("made up")
