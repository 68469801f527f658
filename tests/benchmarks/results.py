"""Results as the measurements make them, small and made up."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.record import Run
from benchmarks.model.run import judged
from benchmarks.registry import ModelShape

SAMPLE_FIELDS = ("median", "minimum", "p20", "p80", "wall_median", "wall_minimum")


def samples(seconds: float, wall: float | None = None) -> dict[str, Any]:
    """Return the times of a candidate, all of them alike."""
    found = {name: seconds if wall is None or "wall" not in name else wall for name in SAMPLE_FIELDS}
    return {**found, "rounds": 3, "inner": 1}


def record(shape: ModelShape, seconds: dict[str, float], **values: Any) -> dict[str, Any]:
    """Return the record of a whole model's shape."""
    found = {**shape.__dict__, "label": shape.label, "checks": {}, "missing": {}}
    return {**found, "samples": {name: samples(x) for name, x in seconds.items()}, **values}


def run(threads: int = 1, **rates: float) -> Run:
    """Return a run that measures nothing; its rates are GFLOP/s by dtype."""
    made = Run.__new__(Run)
    made.threads, made._highest = threads, rates
    return made


def result(records: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    """Return the result of a run of whole models."""
    return {
        "kind": "model",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": {"id": "0123456789abcdef", "modified": False},
        "device": "some-processor",
        "machine": {"processor": "some processor", "family": "", "model": "", "load_average": [0.5]},
        "versions": {"torch": "2", "torch_isa": "AVX2", "transformers": "5", "python": "3"},
        "library": {"isa": "avx2", "stale": False},
        "settings": {"threads": 1, "clock": "process CPU time", "backend": "cpu", "quick": False, "model": "a model"},
        "rates_gflops": {"torch mm float32": 1.0},
        "models": records,
        "figures": [line.as_json() for line in judged(run(), records)],
        "load_average_after": [0.6],
        "seconds": 1.0,
        **values,
    }


def texts_record(name: str, rates: dict[str, float], **values: Any) -> dict[str, Any]:
    """Return the record of a case of real texts, from tokens per second; sorted texts are eight times as many."""
    tokens = {candidate: 800 if candidate == "sorted" else 100 for candidate in rates}
    timed = {candidate: samples(tokens[candidate] / rate) for candidate, rate in rates.items()}
    found = {"name": name, "title": f"{name} texts", "tokens": tokens, "samples": timed, "checks": {}, "missing": {}}
    return {**found, **values}


def texts_result(**values: Any) -> dict[str, Any]:
    """Return the result of a run of real texts, in which everything was timed."""
    rates = {
        "eager": 10.0, "sorted": 25.0, "onnxruntime": 20.0, "onnxruntime-int8": 30.0, "openvino": 20.0,
        "patched": 80.0, "patched-bfloat16": 160.0, "patched-int8": 70.0, "bert": 15.0, "modernbert": 12.0,
    }  # fmt: skip
    halved = {name: rate / 2 if name.startswith("patched") else rate for name, rate in rates.items()}
    made = result([], kind="texts", texts=[texts_record("mixed", rates), texts_record("sentences", halved)])
    return {**made, **values}
