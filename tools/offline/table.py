"""Print rows as aligned text."""

from __future__ import annotations

__all__ = ["aligned"]


def aligned(rows: list[list[str]]) -> str:
    """Return the rows as lines, the first column to the left, numbers to the right; rows may be of unequal length."""
    widths = [max(len(row[i]) for row in rows if len(row) == len(rows[0])) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
