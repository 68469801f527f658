"""The demo itself: load, patch, measure each input before and after, show the results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import deberta_kernels as dk

from .arguments import DEFAULT_MODEL, LENGTHS, QUICK_LENGTHS
from .measure import MEMORY_METHOD, Case, MeasurementError, can_measure, difference_and_times, in_child, peak_memory
from .model import Loaded, load, shared_copy
from .report import Row, conditions, described, draw, format_table, write_numbers
from .results import write_picture
from .text import ragged_batch, single

__all__ = ["run"]

RAGGED_TEXTS = 8
RAGGED_LONGEST = 512
# From here on a stock model's attention takes longer than all that is linear in the length.
LINEAR_TOKENS = 1000


def _chosen_lengths(options: argparse.Namespace) -> list[int]:
    lengths = set(options.lengths or (QUICK_LENGTHS if options.quick else LENGTHS))
    longest = options.max_length
    if longest is not None:
        lengths = {n for n in lengths if n <= longest}
        if not options.lengths and not options.quick:
            lengths.add(longest)
    return sorted(lengths)


def _say(text: str) -> None:
    print(f"[demo] {text}", file=sys.stderr, flush=True)


def _cases(loaded: Loaded, options: argparse.Namespace) -> list[Case]:
    lengths = _chosen_lengths(options)
    if not lengths:
        raise ValueError(f"--max-length {options.max_length} leaves no length to run")
    cases = [Case(f"1 x {n}", *single(loaded.encode, n)) for n in lengths]
    texts = 4 if options.quick else RAGGED_TEXTS
    longest = min(RAGGED_LONGEST, lengths[-1])
    cases.append(Case(f"{texts} texts, one long ({longest})", *ragged_batch(loaded.encode, texts, longest)))
    return cases


def _measure(before: nn.Module, after: nn.Module, case: Case, threads: int, quick: bool) -> tuple[Row, dict[str, Any]]:
    memory: dict[str, int | None] = {}
    for name, model in (("before", before), ("after", after)):
        _say(f"{case.label}: memory {name}")
        memory[name] = in_child(lambda model=model: peak_memory(model, case), threads)["bytes"]  # type: ignore[misc]
    _say(f"{case.label}: time before and after")
    timed = in_child(lambda: difference_and_times(before, after, case, *_pairs(quick)), threads)
    row = Row(
        label=case.label,
        batch=case.input_ids.shape[0],
        tokens=case.tokens,
        seconds_before=timed["before"],
        seconds_after=timed["after"],
        cpu_before=timed["cpu_before"],
        cpu_after=timed["cpu_after"],
        bytes_before=memory["before"],
        bytes_after=memory["after"],
        difference=timed["difference"],
        scale=timed["scale"],
        backend="+".join(name for name, count in timed["calls"].items() if count) or "original code",
    )
    return row, timed


def _seconds_left(row: Row, done: Case, cases: Sequence[Case], quick: bool) -> float:
    """Return about how long the remaining cases take, by the last one: a forward takes more than linear time."""

    def work(case: Case) -> float:
        return case.input_ids.numel() * (case.tokens + LINEAR_TOKENS)

    pairs, limit = _pairs(quick)
    left = 0.0
    for case in cases:
        pair = (row.seconds_before + row.seconds_after) * work(case) / work(done)
        # Three for memory and warming up; then as many as `difference_and_times` begins.
        left += 3 * pair + max(2 * pair, min(pairs * pair, limit + pair))
    return left


def _pairs(quick: bool) -> tuple[int, float]:
    return (3, 2.0) if quick else (15, 6.0)


def _show(options: argparse.Namespace, about: dict[str, Any], rows: list[Row], fallbacks: dict[str, int]) -> None:
    print()
    print(format_table(rows))
    print()
    print(described(about))
    print(f"deberta_kernels {about['deberta_kernels']}, native library: {about['instruction_set'] or 'not there'}")
    print("time: median of one forward pass, the two models taking turns in one process")
    print(f"memory: {about['memory']}")
    largest = max(row.scale for row in rows)
    print(f"difference: largest over real tokens of the last hidden state, whose values reach {largest:.1f}")
    for reason, count in fallbacks.items():
        print(f"original code was used {count} times: {reason}")
    written = write_numbers(options.output, options.name, about, rows)
    picture = options.output / f"{options.name}.png"
    try:
        written.insert(0, write_picture(picture, draw(about, rows)))
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
    print("written: " + ", ".join(map(str, written)))


def run(options: argparse.Namespace) -> int:
    """Run the demo and return the process's exit status."""
    if not can_measure():
        print("The demo measures memory through /proc and needs Linux.", file=sys.stderr)
        return 1
    started = time.perf_counter()
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(1)  # measure.py: this process must stay free of threads
    dtype: torch.dtype = getattr(torch, options.dtype)
    _say(f"loading {options.model or DEFAULT_MODEL}")
    try:
        loaded = load(options.model, dtype)
        after = shared_copy(loaded.model)
        report = dk.patch(after, backend=options.backend)
        cases = _cases(loaded, options)
    except (ImportError, OSError, ValueError) as error:
        print(f"deberta-kernels demo: {error}", file=sys.stderr)
        return 1
    for remark in loaded.remarks:
        _say(remark)
    for line in str(report).splitlines():
        _say(line)
    rows: list[Row] = []
    fallbacks: dict[str, int] = {}
    failed = False
    for i, case in enumerate(cases):
        try:
            row, timed = _measure(loaded.model, after, case, threads, options.quick)
        except MeasurementError as error:
            _say(f"{case.label}: not measured: {error}")
            failed = True
            continue
        left = _seconds_left(row, case, cases[i + 1 :], options.quick)
        remains = f", about {left:.0f} s left" if left else ""
        _say(f"{case.label}: {row.speed_up:.2f}x, difference {row.difference:.1e}{remains}")
        rows.append(row)
        fallbacks.update(timed["fallbacks"])
    if rows:
        about = conditions(loaded.name, dtype, threads) | {"remarks": list(loaded.remarks), "memory": MEMORY_METHOD}
        _show(options, about, rows, fallbacks)
    _say(f"done in {time.perf_counter() - started:.0f} s")
    return 1 if failed or not rows else 0
