"""Predict times of the GPU kernels on an H200 from what was counted, before one has been at hand.

    python tools/predict.py            print the tables
    python tools/predict.py --write    write them into docs/notes/gpu.md

Nothing is compiled or executed: the figures are those of the committed bounds, executed (`make count-ptx`) and compiled
(`make kernels-offline`, `make cuda-offline`); the rule is that of `counted/model.py`. Kernels that expand, sum and fold
are left out. What it is for: to be compared with what a GPU then measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from counted import bounds as executed
from counted.model import Work, cycles, milliseconds, units
from counted.zones import PROGRAM
from offline import bounds as compiled

from deberta_kernels.types import PositionSpec

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "notes" / "gpu.md"
BEGIN, END = "<!-- tools/predict.py begins -->", "<!-- tools/predict.py ends -->"
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
HEADS, HEAD_DIM, TOKENS = 12, 64, 16384
SPEC = PositionSpec()
# SDPA's flash kernel at its usual rate for heads of 64 on this processor: a lead, not a measurement of ours.
SDPA_FLOPS = 350e12
TRITON_KERNELS = {
    "forward": "fwd_kernel bf16 D64 bias", "dq": "bwd_dq_kernel bf16 D64 bias+tables",
    "dk, dv": "bwd_dkv_kernel bf16 D64 bias+tables", "dq alone": "bwd_dq_kernel bf16 D64 bias",
    "dk, dv alone": "bwd_dkv_kernel bf16 D64 bias", "tables": "bwd_position_kernel bf16 D64 none",
}  # fmt: skip
PLAIN = "fwd_kernel bf16 D64 none"
CUDA_KERNELS = {"forward": "disentangled_forward_bf16_d64", "backward": "disentangled_backward_bf16_d64"}
ROWS = {"triton": 64, "cuda": 128}


class Figures:
    """The committed figures of one compiler.

    Attributes:
        name: of the compiler, such as "triton 3.9".
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = ROWS["triton" if name.startswith("triton") else "cuda"]
        self._chip = "sm_90" if name.startswith("triton") else "sm_90a"
        self._executed = executed.load().get(name, {}).get(self._chip, {})

    def zone(self, kernel: str, zone: str) -> dict[str, float]:
        """Return what was executed.

        Raises:
            SystemExit: there is no such figure.
        """
        try:
            return self._executed[f"{kernel}, {zone}"]
        except KeyError:
            text = f"no committed figures of {kernel}, {zone} for {self.name}; run make count-ptx ARGS=--update"
            raise SystemExit(f"tools/predict.py: {text}") from None

    def loop(self, kernel: str, zone: str) -> tuple[int | None, int]:
        """Return the machine instructions of a loop, and how many of them access local memory."""
        version = self.name.split()[1]
        if self._chip == "sm_90":
            entry: dict[str, list[int]] = compiled.load()[version][self._chip][kernel]
            # The only loop of a kernel is called near; in that over far tiles nothing spills without masks and dropout.
            loop = "far" if zone == "far" else "near"
            return entry[f"{loop}_instructions"][0], entry["near_local"][0] if loop == "near" else 0
        entry = json.loads(compiled.BOUNDS.with_name("cuda_bounds.json").read_text())[version][kernel]
        return entry[f"{zone} loop"][0], 0

    def units(self, kernel: str, zone: str) -> dict[str, float]:
        """Return the cycles of each unit, of machine instructions where those are bounded."""
        figures = self.zone(kernel, zone)
        return units(figures) if zone == PROGRAM else units(figures, *self.loop(kernel, zone))

    def work(self, kernel: str) -> Work:
        """Return the estimated cycles of a kernel's parts."""
        if kernel == PLAIN:
            tile = cycles(self.units(kernel, "plain"))
            return Work(tile, tile, cycles(self.units(kernel, PROGRAM)), self.rows)
        near = cycles(self.units(kernel, "near"))
        if "position" in kernel:  # no far tiles; a few hundred programs in all
            return Work(near, 0.0, 0.0, self.rows)
        return Work(near, cycles(self.units(kernel, "far")), cycles(self.units(kernel, PROGRAM)), self.rows)


def time_of(work: Work, length: int) -> float:
    """Return the predicted milliseconds of a kernel at a length."""
    return milliseconds(work, length, heads=HEADS, tokens=TOKENS, spec=SPEC)


def sdpa(length: int) -> float:
    """Return the milliseconds of SDPA's flash kernel at its usual rate."""
    return 1e3 * HEADS * TOKENS * length * 4 * HEAD_DIM / SDPA_FLOPS


def markdown(rows: list[list[str]]) -> str:
    """Return rows as a table, the first one its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def triton_table(figures: Figures) -> str:
    """Return the times of the Triton kernels."""
    works = {title: figures.work(kernel) for title, kernel in TRITON_KERNELS.items()}
    plain = figures.work(PLAIN)
    rows = [["N", "plain, ms", "SDPA flash, ms", "forward, ms", "of plain's speed", "of SDPA's", "backward, ms",
             "dq", "dk, dv", "deterministic, ms", "dq", "dk, dv", "tables"]]  # fmt: skip
    for length in LENGTHS:
        forward, *backward = (time_of(work, length) for work in works.values())
        base = time_of(plain, length)
        numbers = [f"{x:.3f}" for x in (base, sdpa(length), forward)]
        numbers += [f"{base / forward:.2f}", f"{sdpa(length) / forward:.2f}"]
        fused, apart = backward[:2], backward[2:]
        rows.append([str(length), *numbers, *(f"{x:.3f}" for x in (sum(fused), *fused, sum(apart), *apart))])
    return markdown(rows)


def cuda_table(figures: Figures) -> str:
    """Return the times of the CUDA kernels."""
    forward, backward = (figures.work(kernel) for kernel in CUDA_KERNELS.values())
    rows = [["N", "forward, ms", "SDPA flash, ms", "of its speed", "backward, ms"]]
    for length in LENGTHS:
        ours, flash = time_of(forward, length), sdpa(length)
        times = [f"{ours:.3f}", f"{flash:.3f}", f"{flash / ours:.2f}", f"{time_of(backward, length):.3f}"]
        rows.append([str(length), *times])
    return markdown(rows)


def unit_table(figures: Figures, kernels: dict[str, str]) -> str:
    """Return the cycles of each unit for one tile of 64 x 64 pairs, and what they are taken to come to."""
    rows: list[list[str]] = []
    for title, kernel in kernels.items():
        for zone in zones(kernel):
            found = figures.units(kernel, zone)
            rows.append([f"{title}, {zone}", *(f"{x:.0f}" for x in found.values()), f"{cycles(found):.0f}"])
    return markdown([["cycles for 64 x 64 pairs", *found, "together"], *rows])


def executed_table(figures: Figures, kernels: dict[str, str]) -> str:
    """Return what the prediction is made of: figures of the PTX as executed, and machine instructions as compiled."""
    rows = [["64 x 64 pairs", "PTX instructions", "machine instructions (local)", "barriers", "waits", "wavefronts",
             "conflicts", "operands", "bytes"]]  # fmt: skip
    for title, kernel in kernels.items():
        for zone in zones(kernel):
            found, (compiled_count, local) = figures.zone(kernel, zone), figures.loop(kernel, zone)
            numbers = [found[name] for name in ("barriers", "waits", "wavefronts", "conflicts", "operands", "bytes")]
            cells = [f"{found['instructions']:.0f}", f"{compiled_count} ({local})", *(f"{x:g}" for x in numbers)]
            rows.append([f"{title}, {zone}", *cells])
    return markdown(rows)


def zones(kernel: str) -> tuple[str, ...]:
    """Return the zones of a kernel that count in a prediction: the gradients of the tables meet no far tiles."""
    return ("near",) if "position" in kernel else ("near", "far")


def newest(kind: str) -> list[str]:
    """Return the compilers of a kind that have committed figures, the newest first."""
    names = [name for name in executed.load() if name.startswith(kind)]
    return sorted(names, key=lambda name: [int(part) for part in name.split()[1].split(".")], reverse=True)


def text() -> str:
    """Return all tables, each below a line that says what it is."""
    parts: list[str] = []
    for name in newest("triton"):
        figures, title = Figures(name), name.replace("triton", "Triton")
        parts += [f"{title}, predicted:", triton_table(figures), *_tables(figures, TRITON_KERNELS)]
    for name in newest("nvcc")[:1]:
        figures = Figures(name)
        parts += [f"The CUDA kernels, {name}, predicted:", cuda_table(figures), *_tables(figures, CUDA_KERNELS)]
    return "\n\n".join(parts)


def _tables(figures: Figures, kernels: dict[str, str]) -> list[str]:
    return ["From:", unit_table(figures, kernels), executed_table(figures, kernels)]


def written(document: str, tables: str) -> str:
    """Return a document with the tables between its two marks.

    Raises:
        SystemExit: it has none.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"tools/predict.py: {DOCUMENT.name} has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Print or write the predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write them into docs/notes/gpu.md")
    options: Any = parser.parse_args(arguments)
    if options.write:
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), text()), encoding="utf-8")
    else:
        print(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
