"""Rows of text as an aligned table."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,), heads: int = 0) -> str:
    """Return the rows as lines of columns.

    Args:
        rows: cells. A row of another length than the first, such as a name and a reason, does not widen its columns.
        left: columns set to the left; the others, which hold numbers, are set to the right.
        heads: rows above a line of dashes; 0: no such line.
    """
    widths = [max(len(row[i]) for row in rows if len(row) == len(rows[0])) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    if heads:
        # The last column may hold whole sentences.
        lines.insert(heads, "  ".join("-" * width for width in [*widths[:-1], min(widths[-1], 40)]))
    return "\n".join(lines)
