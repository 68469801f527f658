"""Build the site into site/: gather its pages, have them rendered, and look for anything of another host.

    python tools/documentation/site.py                       # in the environment that `make docs` makes

Pages are the files of docs/ and those of the repository that `PAGES` lists. On GitHub a page links to files,
`../CONTRIBUTING.md` or `../csrc/cpu/score.h`. On the site a file that is a page there is linked to as such; any other
is linked to in the repository, where pyproject.toml gives its address, else its name stays as text. The renderer gets a
folder of finished pages and its own configuration, mkdocs.yml, and nothing else: another one can take its place.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools import index_page  # noqa: E402
from tools.documentation.links import relinked  # noqa: E402

__all__ = ["PAGES", "address", "foreign", "gather", "main", "render", "unnoticed"]

# Files outside docs/ that are pages of the site, and where they are there.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "csrc/README.md": "code/cpu.md",
    "csrc/cuda/README.md": "code/cuda.md",
    "tools/ptx/README.md": "code/ptx.md",
    "benchmarks/README.md": "code/benchmarks.md",
    "examples/README.md": "examples.md",
}
GATHERED, SITE = ROOT / "build" / "pages", ROOT / "site"
_ELSEWHERE = re.compile(
    rb"""<(?:script|img|iframe|source)\b[^>]*?\bsrc=["']?(?:https?:)?//[^"'\s>]+"""
    rb"""|<link\b(?![^>]*rel=["']?(?:canonical|edit))[^>]*?\bhref=["']?(?:https?:)?//[^"'\s>]+"""
    # What makes the theme's script ask GitHub about the repository, or fetch a program that draws.
    rb"""|data-md-component="source"[^>]*|<pre class="mermaid\""""
    rb"""|@import\s+(?:url\()?["']?(?:https?:)?//[^"')\s]+|url\(["']?(?:https?:)?//[^"')\s]+"""
)


def address() -> str | None:
    """Return the address of the repository, as pyproject.toml has it; None while it has none."""
    try:
        return index_page.address(ROOT)
    except ValueError:
        return None


def gather(folder: Path) -> None:
    """Write every page of the site and every picture into a folder, links as the site has them."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    sources = {f"docs/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*.md")}
    sources.update({source: folder / page for source, page in PAGES.items() if (ROOT / source).is_file()})
    for source, path in sources.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        page = path.relative_to(folder).as_posix()
        text = (ROOT / source).read_text(encoding="utf-8")
        text = text.replace("<details>", '<details markdown="1">')  # GitHub reads Markdown in it, others when told
        path.write_text(relinked(text, lambda target: _target(target, source, page)), encoding="utf-8")  # noqa: B023


def _target(target: str, source: str, page: str) -> str | None:
    """Return what a link of a file of the repository is on the site; None where it leads nowhere."""
    here = address()
    for form in ("blob", "raw", "tree"):
        target = target.removeprefix(f"{here}/{form}/main/") if here and "://" in target else target
    if re.match(r"[a-z]+:|#|//", target):
        return target
    file, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), file))
    if not (ROOT / path).exists():
        return target  # the renderer complains
    if path.startswith("docs/") and (ROOT / path).is_file() and not path.endswith(".py"):
        goal = path.removeprefix("docs/")
    elif path in PAGES:
        goal = PAGES[path]
    else:
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{here}/{kind}/main/{path}" if here else None
    relative = posixpath.relpath(goal, posixpath.dirname(page) or ".")
    return f"{relative}#{anchor}" if anchor else relative


def foreign(site: Path) -> list[str]:
    """Return what the pages of a built site would fetch from another host."""
    return [
        f"{path.relative_to(site)}: {found.decode(errors='replace')}"
        for path in sorted(site.rglob("*"))
        if path.suffix in (".html", ".css")
        for found in sorted(set(_ELSEWHERE.findall(path.read_bytes())))
    ]


def render(into: Path) -> tuple[int, list[str]]:
    """Render the gathered pages into a folder; return the exit status, and what was complained of."""
    # The theme announces its successor at every build. Not --quiet, which keeps warnings from being counted.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(into)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, **quiet)
    return done.returncode, [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("INFO ")]


def unnoticed() -> list[str]:
    """Return which faults of a page the renderer says nothing of, of those that must make it fail."""
    faults = {"missing.md": "[a](missing.md)", "#missing": "[a](gpu.md#missing)", "missing.svg": "![a](missing.svg)"}
    page = GATHERED / "planted.md"
    page.write_text("\n\n".join(["# Planted", *faults.values()]), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        status, complaints = render(Path(folder))
    page.unlink()
    said = "\n".join(complaints)
    return [fault for fault in (*faults, "- planted.md") if status == 0 or fault not in said]


def main() -> int:
    """Build the site; return the process's exit status."""
    gather(GATHERED)
    status, complaints = render(SITE)
    if status:
        print(*complaints, sep="\n", file=sys.stderr)
        print("The site was not built: mend what is said above, and run `make docs` again.", file=sys.stderr)
        return 1
    if found := foreign(SITE):
        print("The site must fetch nothing from other hosts:", *found, sep="\n  ", file=sys.stderr)
        return 1
    if missed := unnoticed():
        print(f"The renderer does not complain of {', '.join(missed)}; see validation in mkdocs.yml.", file=sys.stderr)
        return 1
    print(f"{sum(1 for _ in SITE.rglob('*.html'))} pages in {SITE.relative_to(ROOT)}/, from {SITE.name}/index.html on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
