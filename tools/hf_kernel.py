"""Lay this package out as a kernel of Hugging Face's hub: its Python and Triton part, as one universal build.

    make hf-kernel                    writes build/hf-kernel
    python tools/hf_kernel.py FOLDER  writes it elsewhere

`kernels` imports the build under a name of its own, beside an installed package or another version of itself. So the
imports of the package's files are made relative, which is all that differs from the sources.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.index_page import version  # noqa: E402

PACKAGE = "deberta_kernels"
NAME = "deberta-kernels"
VARIANT = "torch-universal"
WRITTEN = {"LICENSE", "README.md", "build"}
# The oldest release of `kernels` that this layout is tested with.
KERNELS_MIN = "0.16.0"
# The command line, what only tests use, names for old pickles, the native library, and what imports `adapters`.
LEFT_OUT = ("__main__.py", "info/", "bench/", "demo/", "testing/", "modules/", "lib/", "integrations/adapters.py")
SUFFIXES = (".py", ".json")
LAYERS = '''"""The layers of this kernel; `kernels` finds them by their names."""

from .integrations.hub_layers import DebertaV2Encoder

__all__ = ["DebertaV2Encoder"]
'''
CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernels, kernel, deberta, deberta-v2, deberta-v3, attention, triton]
---

# deberta-kernels

Fused attention for the DeBERTa-v2 and DeBERTa-v3 models of transformers, version {version}: `layers.DebertaV2Encoder`
for the package `kernels`. Python and Triton only; without a GPU it runs tiled PyTorch, or the native library of an
installed `deberta-kernels`. The functions of that package are here too.
"""


def sources() -> dict[str, str]:
    """Return the files of the build: path inside of it -> content.

    Raises:
        SystemExit: what is to be left out is not there, or a file cannot be made relative.
    """
    package, found = ROOT / PACKAGE, {}
    for name in LEFT_OUT:
        if name != "lib/" and not (package / name).exists():  # that of the library is made by its build
            sys.exit(f"[hf-kernel] LEFT_OUT names {name}, which {package} does not have; write where it is now")
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package).as_posix()
        if path.suffix not in SUFFIXES or name.startswith(LEFT_OUT):
            continue
        text = path.read_text(encoding="utf-8")
        found[name] = relative(text, name) if path.suffix == ".py" else text
    found["layers.py"] = LAYERS
    found["__init__.py"] += "\nfrom . import layers  # noqa: E402, F401\n"
    return found


def relative(text: str, name: str) -> str:
    """Return a file of the package with relative imports of the package.

    Args:
        text: content of the file.
        name: its path inside the package.

    Raises:
        SystemExit: it names the package in an import that cannot be made relative.
    """
    lines = text.splitlines(keepends=True)
    dots = "." * (name.count("/") + 1)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            sys.exit(f"[hf-kernel] {name}:{node.lineno} has `import {PACKAGE}`; write `from {PACKAGE} import ...`")
        if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] == PACKAGE:
            line, below = lines[node.lineno - 1], str(node.module)[len(PACKAGE) + 1 :]
            changed = re.sub(rf"from {PACKAGE}(\.[\w.]+)? import", f"from {dots}{below} import", line, count=1)
            if changed == line:
                sys.exit(f"[hf-kernel] {name}:{node.lineno}: the name of the package must follow `from` in one line")
            lines[node.lineno - 1] = changed
    return "".join(lines)


def metadata(files: dict[str, str]) -> dict[str, object]:
    """Return what `kernels` asks of a build; its name as a module follows its content."""
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in files.items()}
    whole = hashlib.sha256("".join(f"{name} {digests[name].hex()}\n" for name in sorted(digests)).encode()).hexdigest()
    return {
        "name": NAME,
        "id": f"_{PACKAGE}_{whole[:12]}",
        "version": int(version(ROOT).split(".")[0]),
        "license": "Apache-2.0",
        "kernels-minver": KERNELS_MIN,
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digests[name]).decode() for name in sorted(digests)},
        },
    }


def is_replaceable(folder: Path) -> bool:
    """Tell whether a folder has nothing but what an earlier run wrote."""
    names = {path.name for path in folder.iterdir()}
    return not names or (names <= WRITTEN and (folder / "build" / VARIANT / "metadata.json").is_file())


def write(folder: Path) -> Path:
    """Write the repository of the kernel beside the folder, then in its place; return the folder of the build."""
    files = sources()
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(beside, files)
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder / "build" / VARIANT


def fill(repository: Path, files: dict[str, str]) -> None:
    """Write a build and what goes with it into an empty folder."""
    build = repository / "build" / VARIANT
    for name, text in {**files, "metadata.json": json.dumps(metadata(files), indent=2) + "\n"}.items():
        path = build / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (repository / "README.md").write_text(CARD.format(version=version(ROOT)), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", repository / "LICENSE")
    repository.chmod(0o755)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=ROOT / "build" / "hf-kernel", help="default: %(default)s"
    )
    folder = parser.parse_args(arguments).folder.resolve()
    try:
        if folder.exists() and not is_replaceable(folder):
            sys.exit(
                f"[hf-kernel] {folder} must be empty or an earlier kernel, but holds other files; name another folder"
            )
        build = write(folder)
    except OSError as error:
        sys.exit(f"[hf-kernel] {folder} cannot be written ({error}); name another folder")
    name = json.loads((build / "metadata.json").read_text())["id"]
    print(f"[hf-kernel] {folder}: {sum(1 for _ in build.rglob('*.py'))} files, imported as {name}")


if __name__ == "__main__":
    main()
