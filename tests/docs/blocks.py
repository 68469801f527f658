"""The Python of the documents: every block marked ```python, and what it needs that a machine may lack."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from tests import needs
from tools.documentation.links import markdown_files

__all__ = ["Block", "blocks"]

_FENCE = re.compile(r"^( *)```python(?:[ \t]+([^\n]*))?\n(.*?)^\1```[ \t]*$", re.M | re.S)
_NAME = re.compile(r"[A-Za-z][\w.-]*/[\w.-]+")
_SUFFIXES = (".py", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".parquet")
# Modules of the package that import one of another.
_IMPORTED_BY = {"deberta_kernels.integrations.adapters": "adapters"}


@dataclass(frozen=True)
class Block:
    """One block of Python of a document.

    Attributes:
        name: of the document, and the number of the block in it, from 1.
        code: the block, without the indentation of the block itself.
        reason: why it is not run, None for nearly all: the words after `skip=` in the line that begins it.
    """

    name: str
    code: str
    reason: str | None

    @property
    def packages(self) -> list[str]:
        """The packages of tests/needs.py that the block imports."""
        found = set()
        for node in ast.walk(ast.parse(self.code)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
        tops = {_IMPORTED_BY.get(module, module.partition(".")[0]) for module in found}
        return sorted(top for top in tops if top in needs.PACKAGES)

    @property
    def answers(self) -> list[str]:
        """The lines that the block says it prints: what stands behind `# ->`."""
        return re.findall(r"# -> (.*\S)", self.code)

    @property
    def checkpoints(self) -> list[str]:
        """The strings of the block that look like the name of a checkpoint on the hub."""
        constants = (n.value for n in ast.walk(ast.parse(self.code)) if isinstance(n, ast.Constant))
        words = {value for value in constants if isinstance(value, str) and _NAME.fullmatch(value)}
        return sorted(word for word in words if not word.endswith(_SUFFIXES))


def blocks(root: Path) -> list[Block]:
    """Return the blocks of every Markdown file of a checkout."""
    found = []
    for path in markdown_files(root):
        name = path.relative_to(root).as_posix()
        for number, match in enumerate(_FENCE.finditer(path.read_text(encoding="utf-8")), 1):
            code = "\n".join(line.removeprefix(match[1]) for line in match[3].splitlines()) + "\n"
            reason = re.search(r'skip="([^"]+)"', match[2] or "")
            found.append(Block(f"{name}:{number}", code, reason[1] if reason else None))
    return found
