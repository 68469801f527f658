"""The drawings of docs/how-it-works.md, as SVG files, from the package's own table of distances.

python tools/documentation/drawings.py         # writes docs/images/{zones,rows,tiles,padding}.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from deberta_kernels.position import delta, position_index  # noqa: E402
from deberta_kernels.types import PositionSpec  # noqa: E402

__all__ = ["DRAWINGS", "main"]

SPEC = PositionSpec(256, 512)  # of every published checkpoint
LENGTH, TILE = 2048, 64
INK, PAPER, EMPTY = "#24292f", "#ffffff", "#eef1f4"
LINEAR, LOGARITHMIC, SATURATED = "#d1495b", "#edae49", "#9bc1d9"


def text(x: float, y: float, words: str, *, size: int = 13, anchor: str = "start", more: str = "") -> str:
    """Return words whose baseline begins, has its middle or ends at a point."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{INK}"{more}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, *, line: str = "none") -> str:
    """Return a rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{line}"/>'


def polygon(points: list[tuple[float, float]], fill: str, more: str = "") -> str:
    """Return a polygon."""
    return f'<polygon points="{" ".join(f"{x:g},{y:g}" for x, y in points)}" fill="{fill}"{more}/>'


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return a whole SVG file, on paper of its own, so that it can be read on a dark page."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" role="img"><title>{title}</title>'
    )
    return "\n".join([head, box(0, 0, width, height, PAPER), *parts, "</svg>", ""])


def legend(x: float, y: float, entries: list[tuple[str, str]]) -> list[str]:
    """Return coloured squares with words, one below the other."""
    parts = []
    for i, (colour, words) in enumerate(entries):
        parts += [box(x, y + 24 * i, 14, 14, colour, line=INK), text(x + 22, y + 12 + 24 * i, words)]
    return parts


def linear_end() -> int:
    """Return the largest distance up to which each distance has a row of its own."""
    rows = delta(torch.arange(LENGTH), SPEC)
    return int((rows.diff() != 1).nonzero()[0])


def band(side: float, low: float, high: float) -> list[tuple[float, float]]:
    """Return the part of a square of scores, queries downwards, keys to the right, with low <= query - key <= high.

    The square's sides are `side`, and so are distances measured.
    """
    square = [(0.0, 0.0), (side, 0.0), (side, side), (0.0, side)]
    for limit, sign in ((high, 1), (low, -1)):
        kept: list[tuple[float, float]] = []
        for (x, y), (u, v) in zip(square, [*square[1:], square[0]]):
            here, there = sign * (limit - (y - x)), sign * (limit - (v - u))
            if here >= 0:
                kept.append((x, y))
            if (here < 0) != (there < 0):
                part = here / (here - there)
                kept.append((x + part * (u - x), y + part * (v - y)))
        square = kept
    return square


def zones() -> str:
    """Draw which pairs of a text lie in which zone."""
    side, x0, y0 = 320.0, 70.0, 50.0
    index, near = position_index(LENGTH, SPEC), linear_end()
    unit = side / LENGTH
    parts = [box(x0, y0, side, side, SATURATED)]
    for low, high, colour in (
        (index.low_end, index.high_start, LOGARITHMIC),
        (-near, near, LINEAR),
    ):
        parts.append(polygon([(x0 + x, y0 + y) for x, y in band(side, low * unit, high * unit)], colour))
    turned = f' transform="rotate(-90 {x0 - 14} {y0 + side / 2})"'
    parts += [
        f'<rect x="{x0}" y="{y0}" width="{side}" height="{side}" fill="none" stroke="{INK}"/>',
        text(x0 + side / 2, y0 - 12, f"keys j, 0 to {LENGTH - 1}", anchor="middle"),
        text(x0 - 14, y0 + side / 2, "queries i", anchor="middle", more=turned),
        *legend(x0 + side + 24, y0 + 20, [
            (LINEAR, f"linear: |i - j| up to {near}, a row each"),
            (LOGARITHMIC, "logarithmic: several distances share a row"),
            (SATURATED, f"saturated: i - j from {index.high_start} up, to {index.low_end} down"),
        ]),
    ]  # fmt: skip
    share = saturated_share(index.low_end, index.high_start)
    words = (
        f"Of the pairs of {LENGTH} tokens {share:.0%}",
        "are saturated: their position terms are",
        "one number a query and one a key.",
    )
    parts += [text(x0 + side + 24, y0 + 130 + 20 * i, line) for i, line in enumerate(words)]
    return drawing(760, 400, "Zones of distances in the square of scores", parts)


def saturated_share(low_end: int, high_start: int) -> float:
    """Return which part of all pairs of a text is saturated."""
    distance = torch.arange(1 - LENGTH, LENGTH)
    pairs = LENGTH - distance.abs()
    return float(pairs[(distance <= low_end) | (distance >= high_start)].sum() / pairs.sum())


def rows() -> str:
    """Draw the row of the position tables for each distance."""
    x0, y0, width, height, most = 70.0, 40.0, 600.0, 260.0, 800
    distance = torch.arange(-most, most + 1)
    found = delta(distance, SPEC).tolist()
    across = lambda x: x0 + (x + most) / (2 * most) * width  # noqa: E731
    down = lambda row: y0 + height - row / 511 * height  # noqa: E731
    index, near = position_index(LENGTH, SPEC), linear_end()
    parts = []
    for low, high, colour in (
        (-most, index.low_end, SATURATED), (index.low_end, -near, LOGARITHMIC), (-near, near, LINEAR),
        (near, index.high_start, LOGARITHMIC), (index.high_start, most, SATURATED),
    ):  # fmt: skip
        parts.append(
            box(across(low), y0, across(high) - across(low), height, colour).replace("/>", ' opacity="0.55"/>')
        )
    points = " ".join(f"{across(x):.1f},{down(row):.1f}" for x, row in zip(distance.tolist(), found))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{INK}" stroke-width="2"/>')
    for x in (index.low_end, -near, 0, near, index.high_start):
        parts.append(text(across(x), y0 + height + 18, str(x), anchor="middle", size=12))
    for row in (0, 256, 511):
        parts.append(text(x0 - 8, down(row) + 4, str(row), anchor="end", size=12))
    parts += [
        text(x0 + width / 2, y0 + height + 40, "distance i - j, in tokens", anchor="middle"),
        text(x0 - 8, y0 - 14, "row of the position tables"),
    ]
    return drawing(720, 360, "The row of a position table for each distance", parts)


def tiles() -> str:
    """Draw the tiles of a text, near and far, and what one near tile reads of a table."""
    count, x0, y0 = 1024 // TILE, 50.0, 56.0
    index = position_index(LENGTH, SPEC)
    unit = 20.0
    parts = [text(x0, y0 - 30, f"1,024 tokens in tiles of {TILE} x {TILE} pairs", size=14)]
    far = 0
    for i in range(count):
        for j in range(count):
            low, high = (i - j) * TILE - TILE + 1, (i - j) * TILE + TILE - 1
            is_far = high <= index.low_end or low >= index.high_start
            far += is_far
            colour = SATURATED if is_far else LINEAR if max(-low, high) <= linear_end() else LOGARITHMIC
            parts.append(box(x0 + j * unit, y0 + i * unit, unit, unit, colour, line=PAPER))
    parts += [
        text(x0, y0 - 10, "keys"), text(x0 - 8, y0 + 14, "queries", anchor="end", size=11).replace("queries", "q"),
        *legend(x0, y0 + count * unit + 18, [
            (LINEAR, "near, in the linear zone"), (LOGARITHMIC, "near, other distances too"),
            (SATURATED, f"far: {far} of {count * count} tiles, plain attention"),
        ]),
    ]  # fmt: skip
    parts += one_tile(440.0, y0)
    return drawing(820, 480, "Tiles of scores, and the band of a table that one of them reads", parts)


def one_tile(x0: float, y0: float) -> list[str]:
    """Draw a small tile beside the band of table rows that it reads along its diagonals."""
    size, unit = 4, 34.0
    parts = [text(x0, y0 - 30, f"A near tile, drawn with {size} x {size} pairs", size=14)]
    shades = ["#fbeaec", "#f6d5d9", "#f0b7be", "#e996a1", "#e58592", "#e07584", "#da5f70"]
    for i in range(size):
        for j in range(size):
            x = i - j + size - 1
            parts.append(box(x0 + j * unit, y0 + i * unit, unit, unit, shades[x], line=PAPER))
            parts.append(text(x0 + (j + 0.5) * unit, y0 + (i + 0.62) * unit, f"{i - j}", anchor="middle", size=12))
    x1 = x0 + size * unit + 60
    for x in range(2 * size - 1):
        parts.append(box(x1, y0 + x * 22, 120, 22, shades[x], line=PAPER))
        parts.append(text(x1 + 60, y0 + 15 + x * 22, f"delta({x - size + 1})", anchor="middle", size=12))
    parts.append(text(x1, y0 - 10, f"its band: {2 * size - 1} rows", size=12))
    words = (
        "All pairs on a diagonal have one distance, so they",
        "read one row. A tile of T x T pairs needs 2T - 1 rows:",
        "two small products (queries times band, keys times",
        "band), read back along the diagonals. Nothing of",
        "the size of all queries times all rows is stored.",
    )
    return [*parts, *(text(x0, y0 + 200 + 20 * i, line) for i, line in enumerate(words))]


def padding() -> str:
    """Draw a padded batch, and the same tokens without padding."""
    lengths, unit, x0, y0 = (16, 5, 9, 3), 20.0, 40.0, 56.0
    colours = ("#d1495b", "#edae49", "#3f88c5", "#59a96a")
    parts = [text(x0, y0 - 22, "a batch of four texts, padded to the longest", size=14)]
    for i, (length, colour) in enumerate(zip(lengths, colours)):
        for j in range(max(lengths)):
            parts.append(box(x0 + j * unit, y0 + i * 26, unit, 20, colour if j < length else EMPTY, line=PAPER))
    y1, x = y0 + 150, x0
    total, all_ = sum(lengths), len(lengths) * max(lengths)
    parts.append(
        text(x0, y1 - 14, f"the same {total} tokens of {all_}, one after the other: what the layers compute", size=14)
    )
    for length, colour in zip(lengths, colours):
        for _ in range(length):
            parts.append(box(x, y1, unit, 20, colour, line=PAPER))
            x += unit
    return drawing(760, 260, "A batch with padding, and without", parts)


DRAWINGS = {"zones": zones, "rows": rows, "tiles": tiles, "padding": padding}


def main() -> int:
    """Write every drawing."""
    for name, draw in DRAWINGS.items():
        path = ROOT / "docs" / "images" / f"{name}.svg"
        path.write_text(draw(), encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
