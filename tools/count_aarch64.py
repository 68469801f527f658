"""Count the instructions of the inner loops of the products for aarch64, in what the cross compiler makes of them.

    python tools/count_aarch64.py            print the table
    python tools/count_aarch64.py --write    write it into docs/notes/aarch64.md

Nothing is run, and nothing is timed: no such processor is here. A product is an instruction that multiplies and adds:
four numbers with `fmla`, eight with `bfdot`. Beside products a loop has loads, stores of what found no register, other
instructions on vectors, which take the place of a product, and those of addresses and the loop.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tools")]

import aarch64  # noqa: E402  (of this folder)
import native_build  # noqa: E402

DOCUMENT = ROOT / "docs" / "notes" / "aarch64.md"
OBJDUMP = "aarch64-linux-gnu-objdump"
PRODUCTS = ("fmla", "bfdot", "bfmmla")
LANES, WORDS = 4, 4  # numbers of a register; words of a row that are loaded at once
VECTOR, FEW_ROWS = 8, 4  # numbers of a vector; rows of a weight that few tokens are multiplied with at once
HEAD = ("variant, operand", "loop", "products", "loads", "stores", "other vector", "all", "least possible")
Instruction = tuple[int, str, str]  # address, name, operands


@dataclass(frozen=True)
class Loop:
    """What one pass of an inner loop takes, in instructions; loads and stores in registers."""

    products: int
    loads: int
    stores: int
    others: int
    instructions: int


def counted(body: list[Instruction]) -> Loop:
    """Count the instructions of a loop."""
    products = loads = stores = others = 0
    for _, name, operands in body:
        registers = 2 if name in ("ldp", "stp") else 1
        is_vector = operands.startswith(("q", "v", "{v", "d", "s"))
        if name in PRODUCTS:
            products += 1
        elif name.startswith("ld") and is_vector:
            loads += registers
        elif name.startswith("st") and is_vector:
            stores += registers
        elif is_vector:
            others += 1
    return Loop(products, loads, stores, others, len(body))


def functions(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Give each function of a disassembly with its instructions."""
    name, body = "", list[Instruction]()
    for line in listing.splitlines():
        if found := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            if name:
                yield name, body
            name, body = found[1].replace("(anonymous namespace)::", ""), []
        elif found := re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)", line):
            body.append((int(found[1], 16), found[2], found[3]))
    if name:
        yield name, body


def inner_loops(body: list[Instruction]) -> list[Loop]:
    """Return the loops of a function that hold no other."""
    place = {address: i for i, (address, _, _) in enumerate(body)}
    spans = []
    for end, (_, name, operands) in enumerate(body):
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if target and name.startswith(("b", "cb", "tb")) and name not in ("bl", "blr"):
            start = place.get(int(target[1], 16))
            if start is not None and start <= end:
                spans.append((start, end))
    inner = [one for one in spans if not any(one != two and one[0] <= two[0] and two[1] <= one[1] for two in spans)]
    return [counted(body[start : end + 1]) for start, end in inner]


def rows_of(isa: str, word: str, listing: str) -> list[tuple[str, str, Loop, int]]:
    """Return variant, name, counts and the least possible instructions of each product's loops for a kind of words."""
    found = []
    operand = "bfloat16" if word == "BFloat16Word" else "float32"
    for name, body in functions(listing):
        if few := re.search(rf"\bFewTokens<{word}>::add_rows<0, (\d)>", name):
            loop = max(inner_loops(body), key=lambda one: one.products)
            fewest = least(loop.products, (FEW_ROWS + int(few[1])) * VECTOR // LANES)
            found.append((f"`{isa}`, {operand}", f"few tokens, {FEW_ROWS} x {few[1]}", loop, fewest))
            continue
        shape = re.search(rf"\b(gemm_rows|score_panels)<(?:{word}, )?(\d)(?:, (true|false))?>", name)
        if shape is None or word not in name or "BFloat16Word" in name.replace(word, ""):
            continue
        loops = sorted(inner_loops(body), key=lambda loop: (-loop.products, loop.instructions))
        columns = 8 * int(shape[2])
        along = loops[0]
        rows = along.products * LANES // (WORDS * columns)
        title = f"{'scores' if shape[1] == 'score_panels' else 'others'}, {rows} x {columns}"
        asks_ahead = shape[3] == "true"
        title += ", ahead" if asks_ahead else ""
        asked = rows + 2 if asks_ahead else 0  # a test and a branch around them
        fewest = least(along.products, rows + WORDS * columns // LANES) + asked
        found.append((f"`{isa}`, {operand}", title, along, fewest))
        if shape[1] == "gemm_rows" and not asks_ahead:
            products = along.products // WORDS
            across = min((one for one in loops if one.products == products), key=lambda one: one.instructions)
            loads = rows // LANES + columns // LANES
            found.append((f"`{isa}`, {operand}", f"{title}, across", across, least(products, loads)))
    return sorted(found, key=lambda row: row[1], reverse=True)


def least(products: int, loads: int) -> int:
    """Return how few instructions a loop could have: its loads two registers each, an addition, a test and a branch."""
    return products + -(-loads // 2) + 3


def table() -> list[tuple[str, str, Loop, int]]:
    """Compile the variants; return all rows."""
    folder = aarch64.FOLDER / "counted"
    folder.mkdir(parents=True, exist_ok=True)
    layout = native_build.Layout()
    objects, left_out = native_build.compile_variants(layout, [aarch64.COMPILER], "linux-aarch64", folder)
    if left_out:
        sys.exit(f"[aarch64] {left_out}")
    rows = []
    for isa, word in (("neon", "FloatWord"), ("neon_bf16", "BFloat16Word")):
        command = [OBJDUMP, "-d", "-C", "--no-show-raw-insn", str(objects[isa])]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows += rows_of(isa, word, listing)
    return rows


def written(rows: list[tuple[str, str, Loop, int]]) -> str:
    """Return the table as Markdown."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for variant, title, loop, fewest in rows:
        counts = (loop.products, loop.loads, loop.stores, loop.others, loop.instructions, fewest)
        lines.append((variant, title, *map(str, counts)))
    version = native_build.version_of([aarch64.COMPILER]).partition("\n")[0]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\nCompiled by `{version}`."


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write it into {DOCUMENT.relative_to(ROOT)}")
    options = parser.parse_args()
    text = written(table())
    print(text)
    if options.write:
        page = DOCUMENT.read_text(encoding="utf-8")
        marks = re.compile(r"(<!-- counted -->\n).*?(<!-- end -->)", re.S)
        DOCUMENT.write_text(marks.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
