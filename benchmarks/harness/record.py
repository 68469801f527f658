"""One measurement from its options to its file: settings, progress with the time left, result, exit status."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.harness.clock import Pace
from benchmarks.harness.figures import Figure, Line, judge
from benchmarks.harness.process import RESULTS, file_name, note, now, write_json

__all__ = ["Progress", "Run", "options", "store"]

SCHEMA = 1
BACKENDS = ("cpu", "torch", "reference")  # those that compute on a processor


def options(kind: str, about: str | None, *, strict: bool = True, backend: bool = True) -> argparse.ArgumentParser:
    """Return the parser of a kind with the options that all have.

    Args:
        kind: as on the command line.
        about: docstring of its module.
        strict: it has figures, and `--strict`.
        backend: it runs ours on a backend of choice.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {kind}",
        description=about,
        epilog="--list shows shapes, candidates and figures; --threads 1,all is the default: one run with each",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a part of the shapes, few rounds")
    parser.add_argument("--threads", type=int, default=1, help="above 1, the wall clock counts instead of CPU time")
    parser.add_argument("--json", default="", help="write here, not to benchmarks/results/<device>/; '-': nowhere")
    if backend:
        parser.add_argument("--backend", default="cpu", choices=BACKENDS, help="which backend is ours")
    if strict:
        parser.add_argument("--strict", action="store_true", help="exit with 1 when a figure misses its must")
    return parser


class Progress:
    """The steps of a long measurement, and how long the rest will take if it goes on at this pace."""

    def __init__(self, weights: Iterable[float]) -> None:
        """Take what each step is expected to take, in any unit."""
        self._weights = list(weights)
        self._started, self._steps = time.monotonic(), 0

    def step(self, text: str = "") -> str:
        """Finish a step and say so; return how long the rest takes."""
        self._steps += 1
        done, total = sum(self._weights[: self._steps]), sum(self._weights)
        seconds = (time.monotonic() - self._started) * (total - done) / max(done, 1e-9)
        left = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        if text:
            note(f"{self._steps} of {len(self._weights)}, {left} left; {text}")
        return left


class Run:
    """One run of a kind: what was asked for, and the result on its way to its file.

    Attributes:
        threads: threads of everything; above 1 the wall clock counts instead of CPU time.
        backend: explicit backend of ours.
        quick: a part of the shapes, few rounds.
        result: what the JSON file holds.
    """

    def __init__(self, kind: str, given: argparse.Namespace, **settings: Any) -> None:
        """Set the threads and begin the result of a kind, under the name that its file has."""
        self.threads, self.quick = given.threads, given.quick
        self.backend = getattr(given, "backend", "cpu")
        self._where, self._strict = given.json, getattr(given, "strict", False)
        self._started = time.perf_counter()
        self._highest: dict[str, float] = {}
        torch.set_num_threads(self.threads)
        with suppress(RuntimeError):  # work was given to them before
            torch.set_num_interop_threads(1)
        self.result = preamble(kind, self.threads, self.backend, quick=self.quick)
        if part := getattr(given, "only", None):
            self.result["settings"]["only"] = list(part)
        self.result["settings"] |= settings

    @property
    def pace(self) -> Pace:
        """Return how long one shape is measured."""
        return Pace(9, 3, 2.0) if self.quick else Pace()

    def pick(self, samples: dict[str, Any]) -> tuple[float, float]:
        """Return the median and the minimum that count, in seconds."""
        if self.threads > 1:
            return samples["wall_median"], samples["wall_minimum"]
        return samples["median"], samples["minimum"]

    def times(self, samples: dict[str, dict[str, Any]]) -> str:
        """Return the times of a shape's candidates in one line."""
        medians = {name: self.pick(sample)[0] * 1e3 for name, sample in samples.items()}
        return ", ".join(f"{name} {x:.{0 if x > 100 else 2}f} ms" for name, x in medians.items())

    def measure_rates(self) -> None:
        """Measure the rates of matrix products, which bound what can be reached."""
        self.result["rates_gflops"] = machine.rates(self.pace, self.threads)
        note(f"GFLOP/s: {self.result['rates_gflops']}")
        for name, rate in self.result["rates_gflops"].items():
            # The own micro-kernel runs on one thread.
            self._seen(name.split()[-1], (rate or 0.0) * (self.threads if name.startswith("own") else 1))

    def own_peak(self, dtype: str) -> float | None:
        """Measure the rate of the kernel's own micro-kernel again, and return it in GFLOP/s."""
        rate = machine.own_peak(dtype)
        self._seen(dtype, (rate or 0.0) * self.threads)
        return rate

    def _seen(self, dtype: str, rate: float) -> None:
        self._highest[dtype] = max(rate, self._highest.get(dtype, 0.0))

    def judge(
        self, figure: Figure, record: dict[str, Any] | None, flops: float | None, skipped: str = "not in this run"
    ) -> Line:
        """Hold a figure to its bar, with our needed FLOPs at the highest rate of a product seen in this run."""
        rate = self._highest.get(figure.shape.dtype, 0.0) if flops else 0.0
        line = judge(
            figure, record, self.pick, flops / rate / 1e9 if flops and rate else None, skipped or "not in this run"
        )
        return line

    def keep(self, lines: list[Line] | None = None, **values: Any) -> None:
        """Take values and figures into the result, and write its file: an interrupted run leaves what it has."""
        self.result.update(values)
        if lines is not None:
            self.result["figures"] = [line.as_json() for line in lines]
        self.result["load_average_after"] = [round(x, 2) for x in os.getloadavg()]
        self.result["seconds"] = round(time.perf_counter() - self._started, 1)
        store(self.result, self._where)

    @property
    def status(self) -> int:
        """Return the exit status: 1 for a wrong answer of ours, or with `--strict` for a missed figure."""
        verdicts = {figure["verdict"] for figure in self.result.get("figures", [])}
        return int("RED" in verdicts or (self._strict and "MISSED" in verdicts))


def preamble(kind: str, threads: int, backend: str, *, quick: bool) -> dict[str, Any]:
    """Return the part of a result that says what was measured when, where, with what and how."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": now(),
        "commit": machine.commit(),
        "device": machine.device_name(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "library": {key: value for key, value in machine.library().items() if key != "path"},
        "settings": {
            "threads": threads,
            "backend": backend,
            "quick": quick,
            "clock": "process CPU time" if threads == 1 else "wall clock",
        },
    }


def store(result: dict[str, Any], where: str) -> None:
    """Write the JSON file.

    Args:
        result: begins as `preamble` says.
        where: a file; "" for benchmarks/results/<device>/<kind>-<date>-<commit>.json, the instruction set behind it if
            one was asked for, and the threads if more than one; "-" for nowhere.
    """
    if where == "-":
        return
    settings = result["settings"]
    more = [settings["isa"]] if settings.get("isa") else []
    more += [f"{settings['threads']}threads"] if settings["threads"] > 1 else []
    path = Path(where) if where else RESULTS / result["device"] / file_name(result["kind"], result, *more)
    new = not path.exists()
    write_json(path, result)
    if new:
        note(f"written: {path}")
