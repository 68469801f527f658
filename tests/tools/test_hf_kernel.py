"""The layout of a kernel for Hugging Face's hub, and the package under another name beside itself."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels.native import absence
from tests.checkout import ROOT
from tools import hf_kernel


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_kernel.write(tmp_path_factory.mktemp("hf") / "kernel")


def load(build: Path) -> ModuleType:
    """Import a build under its own name, as `kernels` does: anew for every folder, with what that name has below it."""
    name = json.loads((build / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def call() -> dict[str, Any]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 33, 16, requires_grad=True) for _ in range(3))
    tables = {name: torch.randn(2, 32, 16, requires_grad=True) for name in ("pos_key", "pos_query")}
    mask = torch.arange(33) < torch.tensor([[33], [20]])
    return {"q": q, "k": k, "v": v, **tables, "attention_mask": mask, "position_buckets": 16}


def test_the_build_names_itself_nowhere_and_its_digests_are_right(build: Path) -> None:
    metadata = json.loads((build / "metadata.json").read_text())
    files = {path.relative_to(build).as_posix(): path for path in build.rglob("*") if path.is_file()}
    assert set(metadata["digest"]["files"]) == set(files) - {"metadata.json"}
    for name, digest in metadata["digest"]["files"].items():
        assert base64.b64decode(digest) == hashlib.sha256(files[name].read_bytes()).digest(), name
        nodes = ast.walk(ast.parse(files[name].read_text())) if name.endswith(".py") else ()
        for node in nodes:
            named = [x.name for x in node.names] if isinstance(node, ast.Import) else []
            named += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [x for x in named if x.split(".")[0] == "deberta_kernels"], name
    assert metadata["id"].isidentifier()
    assert {"impl/triton/kernels/primitives.py", "models/encoder.py", "layers.py"} <= set(files)
    assert not any(name.startswith(("lib/", "bench/", "demo/", "info/")) or name.endswith(".so") for name in files)
    assert "library_name: kernels" in (build.parents[1] / "README.md").read_text()


def test_two_copies_compute_side_by_side_with_operators_of_their_own(build: Path, tmp_path: Path) -> None:
    files = {**hf_kernel.sources(), "env.py": hf_kernel.sources()["env.py"] + "# another version\n"}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hf_kernel, "sources", lambda: files)
        other = load(hf_kernel.write(tmp_path / "other"))
    copies = (dk, load(build), other)
    assert len({copy.__name__ for copy in copies}) == 3
    results = []
    for copy in copies:
        arguments = call()
        copy.reset_stats()
        found = copy.disentangled_attention(**arguments)
        (found**2).sum().backward()
        results.append([found, *(x.grad for x in arguments.values() if getattr(x, "requires_grad", False))])
        assert sum(copy.stats()["calls"].values()) == 1
        operator = getattr(torch.ops, copy.__name__).attention.default
        assert operator._schema.name == f"{copy.__name__}::attention"
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], atol=0, rtol=0)


def test_the_same_build_in_two_folders_is_loaded_twice(build: Path, tmp_path: Path) -> None:
    again = hf_kernel.write(tmp_path / "again")
    assert load(build).__name__ == load(again).__name__
    arguments = call()
    with torch.profiler.profile():
        found = load(again).disentangled_attention(**arguments)
    torch.testing.assert_close(found, dk.disentangled_attention(**arguments), atol=0, rtol=0)


def test_a_copy_calls_its_own_operator_where_somebody_watches(build: Path) -> None:
    copy, arguments = load(build), call()
    with torch.profiler.profile() as profile:
        copy.disentangled_attention(**arguments)
    assert f"{copy.__name__}::attention" in {event.name for event in profile.events()}


def test_a_copy_finds_the_library_of_the_installed_package(build: Path) -> None:
    copy = load(build)
    found = importlib.import_module(f"{copy.__name__}.native.absence")
    assert found is not absence
    assert found.INSTALLED == absence.INSTALLED


def test_a_copy_alone_runs_on_pytorch_and_says_what_to_install(build: Path) -> None:
    name = json.loads((build / "metadata.json").read_text())["id"]
    program = f"""
import importlib.util, sys, warnings
sys.modules["deberta_kernels"] = None
spec = importlib.util.spec_from_file_location({name!r}, {str(build / "__init__.py")!r})
module = sys.modules[{name!r}] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
x = torch.randn(1, 2, 9, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    module.disentangled_attention(x, x, x, position_buckets=4)
print(module.stats()["calls"]["torch"], "pip install deberta-kernels" in str(caught[0].message))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.stdout.split() == ["1", "True"], done.stderr


@pytest.mark.packages("triton")
def test_the_triton_kernels_of_a_copy_compute_what_the_packages_do(build: Path) -> None:
    program = f"""
from pathlib import Path
import torch
import deberta_kernels
from tests.tools.test_hf_kernel import call, load
found = []
for copy in (deberta_kernels, load(Path({str(build)!r}))):
    arguments = call()
    out = copy.disentangled_attention(**arguments, backend="triton")
    out.square().sum().backward()
    found.append([out, *(x.grad for x in arguments.values() if getattr(x, "requires_grad", False))])
    assert copy.stats()["calls"]["triton"] == 1
torch.testing.assert_close(*found, atol=0, rtol=0)
"""
    paths = os.pathsep.join(filter(None, (str(ROOT), *sys.path)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_layer_has_what_kernels_asks_for(build: Path) -> None:
    layer = load(build).layers.DebertaV2Encoder
    known = set(dir(torch.nn.Module))
    assert set(dir(layer)) - known == {"has_backward", "can_torch_compile"}
    assert layer.__init__ is torch.nn.Module.__init__


def test_imports_become_relative_wherever_they_stand() -> None:
    text = (
        "from deberta_kernels import env\nif 1:\n    from deberta_kernels.impl.cpu import (\n        forward,\n    )\n"
    )
    expected = "from .. import env\nif 1:\n    from ..impl.cpu import (\n        forward,\n    )\n"
    assert hf_kernel.relative(text, "models/x.py") == expected
    assert hf_kernel.relative("from deberta_kernels import env\n", "x.py") == "from . import env\n"
    assert hf_kernel.relative("import deberta_kernels_extra\n", "x.py") == "import deberta_kernels_extra\n"


def test_an_import_that_cannot_become_relative_is_named() -> None:
    with pytest.raises(SystemExit, match=r"models/x.py:1 has `import deberta_kernels`; write `from"):
        hf_kernel.relative("import deberta_kernels.env\n", "models/x.py")
    with pytest.raises(SystemExit, match=r"x.py:1: the name of the package must follow `from` in one line"):
        hf_kernel.relative("from \\\n  deberta_kernels import env\n", "x.py")


def test_a_target_that_cannot_be_a_folder_is_refused_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    for target in ("file", "file/kernel"):
        with pytest.raises(SystemExit, match=r"file.* cannot be written .*name another folder"):
            hf_kernel.main([str(tmp_path / target)])
    monkeypatch.setattr(hf_kernel, "ROOT", tmp_path)  # without a licence to copy
    monkeypatch.setattr(hf_kernel, "sources", lambda: {"env.py": ""})
    monkeypatch.setattr(hf_kernel, "version", lambda root: "0.0.0")
    with pytest.raises(SystemExit, match=r"cannot be written \(.*LICENSE"):
        hf_kernel.main([str(tmp_path / "kernel")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_to_an_earlier_kernel_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "kernel")
    for _ in range(2):
        hf_kernel.main([str(tmp_path / "link")])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "kernel" / "LICENSE").is_file()


def test_what_is_left_out_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_kernel, "LEFT_OUT", (*hf_kernel.LEFT_OUT, "gone.py"))
    with pytest.raises(SystemExit, match=r"LEFT_OUT names gone\.py, which .*deberta_kernels does not have"):
        hf_kernel.sources()


def test_every_module_of_the_build_is_imported_without_the_package(build: Path) -> None:
    program = f"""
import importlib.util, json, sys
from pathlib import Path
sys.modules["deberta_kernels"] = None
build = Path({str(build)!r})
name = json.loads((build / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for path in build.rglob("*.py"):
    if "triton" not in path.parts:
        below = path.relative_to(build).with_suffix("").parts
        importlib.import_module(".".join([name, *below[:-1], *[x for x in below[-1:] if x != "__init__"]]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_a_folder_with_other_files_is_left_alone_and_an_earlier_kernel_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="must be empty or an earlier kernel, but holds other files; name another"):
        hf_kernel.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    folder = tmp_path / "kernel"
    hf_kernel.main([str(folder)])
    (folder / "build" / "stale").touch()
    hf_kernel.main([str(folder)])
    assert [path.name for path in (folder / "build").iterdir()] == [hf_kernel.VARIANT]
    (folder / ".git").mkdir()  # a clone of what was published
    with pytest.raises(SystemExit, match="but holds other files"):
        hf_kernel.main([str(folder)])
    (folder / ".git").rmdir()
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "README.md", "build"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel", "mine"]
