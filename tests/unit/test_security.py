"""What the package must not do: run text as code, unpickle, open a shell or a connection, or leave files behind."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import deberta_kernels

PACKAGE = Path(deberta_kernels.__file__).resolve().parent
FILES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN_MODULES = {
    "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop",
    "socket", "ssl", "http", "urllib", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "xmlrpc", "huggingface_hub",
    "tempfile", "pty", "commands", "cffi",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv",
    "torch.load", "torch.save", "torch.hub.load", "torch.utils.cpp_extension.load",
}  # fmt: skip
# Modules imported by name come from constants in these files, never from a configuration or a caller.
IMPORTS_BY_NAME = {"__init__.py", "dispatch.py", "models/registry.py"}
OPENS_LIBRARIES = {"native/__init__.py", "testing/memory.py", "impl/cuda/driver.py", "impl/cuda/nvrtc.py"}
STARTS_PROCESSES = {"__main__.py", "demo/checkpoint.py", "info/software.py"}
# The cache of compiled CUDA modules and of self-tests: a folder of the user's own, tested in test_cuda_image.py.
WRITES_FILES = {"demo/results.py", "demo/measure.py", "testing/memory.py", "impl/cache.py"}


def place(path):
    return path.relative_to(PACKAGE).as_posix()


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(dotted(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_the_scan_sees_the_package():
    assert {"api.py", "impl/cpu.py", "demo/model.py"} <= {place(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=place)
def test_module_imports_nothing_dangerous(path):
    assert not {name for name in imported(path) if name.split(".")[0] in FORBIDDEN_MODULES}


@pytest.mark.parametrize("path", FILES, ids=place)
def test_module_calls_nothing_dangerous(path):
    for name, node in calls(path):
        assert name not in FORBIDDEN_CALLS, f"{place(path)}:{node.lineno} calls {name}"
        shell = [keyword for keyword in node.keywords if keyword.arg == "shell"]
        assert not shell, f"{place(path)}:{node.lineno} passes shell="


@pytest.mark.parametrize(
    ("function", "places"),
    [
        ("importlib.import_module", IMPORTS_BY_NAME),
        ("import_module", set()),
        ("ctypes.CDLL", OPENS_LIBRARIES),
        ("subprocess.run", STARTS_PROCESSES),
        ("subprocess.Popen", set()),
        ("os.fork", {"demo/measure.py"}),
    ],
)
def test_powerful_function_is_called_in_its_place_only(function, places):
    assert {place(path) for path in FILES if function in [name for name, _ in calls(path)]} <= places


def test_only_the_demo_and_the_cache_write_files():
    writing = ("write_text", "write_bytes", "mkdir", "makedirs", "savefig", "unlink", "rmtree", "fdopen")
    found = {place(path) for path in FILES if any(name.split(".")[-1] in writing for name, _ in calls(path))}
    assert found <= WRITES_FILES


USE = """
import torch, deberta_kernels as dk
q, table = torch.randn(1, 2, 5, 8), torch.randn(2, 32, 8)
dk.disentangled_attention(q, q, q, table, table, position_buckets=16).sum()
dk.explain(q, q, q)
"""


def test_use_leaves_no_file_and_needs_no_home(tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    state = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "TMP", "TEMP"))}
    state |= {"HOME": str(home), "TMPDIR": str(work), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    state["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=work, env=state, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not [*home.rglob("*"), *work.rglob("*")]
