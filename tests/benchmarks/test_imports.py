"""The measurements import each other in one direction, and the command line loads nothing before it must."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import process

FOLDER = process.ROOT / "benchmarks"


def _name(path: Path) -> str:
    return ".".join(path.relative_to(process.ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports() -> dict[str, set[str]]:
    """Return module -> modules of the package that it imports anywhere, in functions as well."""
    names = {_name(path): path for path in FOLDER.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("benchmarks"):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        found[name] = imported & names.keys() - {name}
    return found


def test_no_module_imports_itself_through_others() -> None:
    left = _imports()
    assert len(left) > 30
    while free := {name for name, imported in left.items() if not imported & left.keys()}:
        left = {name: imported for name, imported in left.items() if name not in free}
    assert left == {}


def test_the_harness_knows_no_room() -> None:
    rooms = tuple(f"benchmarks.{room}" for room in ("core", "model", "training", "gpu"))
    below = {k: v for k, v in _imports().items() if k.startswith(("benchmarks.harness", "benchmarks.registry"))}
    assert {k: bad for k, v in below.items() if (bad := {x for x in v if x.startswith(rooms)})} == {}


def test_no_folder_is_crowded() -> None:
    folders = [FOLDER, *(path for path in FOLDER.iterdir() if path.is_dir() and path.name != "results")]
    assert all(len(list(folder.glob("*.py"))) <= 14 for folder in folders)


def test_the_command_line_does_not_load_torch() -> None:
    code = "import sys, benchmarks.__main__, benchmarks.registry; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=process.environment(), check=False)
    assert done.returncode == 0
