"""Time whole models: patched against eager, ONNX Runtime, OpenVINO and BERT, on full and ragged batches.

python -m benchmarks model                   random weights in v3-base geometry, half an hour for each number of threads
python -m benchmarks model DIRECTORY         a local checkpoint
python -m benchmarks model --quick           short batches, two minutes
python -m benchmarks model --memory          long documents and the largest model: memory alone
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import record, tables
from benchmarks.harness.arguments import existing_folder, names
from benchmarks.harness.clock import Pace, interleave, rotating
from benchmarks.harness.figures import Line
from benchmarks.harness.process import note
from benchmarks.harness.record import Progress, Run
from benchmarks.harness.work import needed_flops
from benchmarks.model.batches import Batch, draw_batches
from benchmarks.model.checking import Tolerance, Truth, check_call, tolerance, truths
from benchmarks.model.peaks import measure_large, measure_peaks
from benchmarks.model.rivals import Call, Models, candidate_names, forward, load_plain, patched
from benchmarks.registry import CANDIDATES, CORE_MODEL_FIGURES, DTYPES, MODEL_FIGURES, MODEL_SHAPES, ModelShape

__all__ = ["judged", "main", "measure_lengths"]

# Large batches take tens of seconds a call in eager.
PACE, QUICK_PACE = Pace(rounds=15, least=3, seconds=25.0), Pace(rounds=3, least=2, seconds=3.0)
QUICK_TOKENS = 512


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = record.options("model", __doc__)
    parser.add_argument(
        "source", nargs="?", default="", type=existing_folder, help="directory of a DeBERTa-v2 or v3 checkpoint"
    )
    parser.add_argument("--only", default="", type=names(DTYPES), help=f"dtypes, comma-separated: {', '.join(DTYPES)}")
    parser.add_argument("--memory", action="store_true", help="measure the memory of long documents and large models")
    parser.add_argument("--no-peaks", action="store_true", help="leave out the peak memory of each candidate")
    return parser.parse_args(arguments)


def measure_shapes(run: Run, models: Models, shapes: Iterable[ModelShape]) -> None:
    """Check and time every candidate of every shape, short ones before long ones."""
    plain = models.plain("float32")
    batches = {shape: draw_batches(shape, plain.config.vocab_size) for shape in shapes}
    note("float64 results to check against")
    known = truths(plain, {shape: found[0] for shape, found in batches.items()})
    records: list[dict[str, Any]] = []
    allowed: dict[str, list[Tolerance]] = {}
    progress = Progress(10 + shape.batch * shape.length / 100 for shape in batches)
    for shape, found in batches.items():
        shorter = allowed.setdefault(shape.dtype, [])
        records.append(_measure(run, models, shape, found, known.get(shape), shorter))
        run.keep(judged(run, records), models=records, complete=len(records) == len(batches))
        progress.step(f"{shape.label} {shape.dtype}: {run.times(records[-1]['samples'])}")


def _calls(models: Models, shape: ModelShape) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the forwards of a shape's candidates, and why others have none."""
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name in candidate_names(shape):
        if absent := CANDIDATES["model"][name].missing:
            missing[name] = absent
            continue
        try:
            calls[name] = models.call(name, shape)
        except Exception as error:  # a rival that cannot be built leaves the others to be measured
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            note(f"{shape.label} {shape.dtype}: {name}: {missing[name]}")
    return calls, missing


def _measure(
    run: Run, models: Models, shape: ModelShape, batches: list[Batch], truth: Truth | None, shorter: list[Tolerance]
) -> dict[str, Any]:
    found: dict[str, Any] = {**shape.__dict__, "label": shape.label, "checks": {}, "samples": {}, "missing": {}}
    found["lengths"] = [batch.attention_mask.sum(1).tolist() for batch in batches]
    if not models.source:
        needed = [needed_flops(lengths, "model") for lengths in found["lengths"]]
        found["needed_gflop"] = sum(needed) / len(needed) / 1e9
    calls, found["missing"] = _calls(models, shape)
    eager = calls["eager"](batches[0])
    limits = tolerance(shape, batches[0], eager, truth, shorter)
    shorter.append(limits)
    found["tolerance"] = limits.as_json()
    for name in [name for name in calls if name not in ("eager", "bert")]:
        outcome = check_call(calls[name], eager, batches[0], truth, limits)
        found["checks"][name] = {**outcome.as_json(), "text": outcome.text}
        if not outcome.ok:
            note(f"{shape.label} {shape.dtype}: {name} is RED, not timed: {outcome.text}")
            del calls[name]
    turning = {name: rotating(call, batches) for name, call in calls.items()}
    samples = interleave(turning, QUICK_PACE if run.quick else PACE)
    found["samples"] = {name: sample.as_json() for name, sample in samples.items()}
    return found


def judged(run: Run, records: list[dict[str, Any]]) -> list[Line]:
    """Return the lines of all figures."""
    by_shape = {(found["label"], found["dtype"]): found for found in records}
    lines = []
    for figure in MODEL_FIGURES:
        found = by_shape.get((figure.shape.label, figure.shape.dtype))
        needed = found.get("needed_gflop") if found else None
        lines.append(run.judge(figure, found, 1e9 * needed if needed else None))
    return lines


def measure_lengths(run: Run) -> list[Line]:
    """Check and time v3-base, eval, float32, one text at a time, patched against unpatched, for the core's table."""
    try:
        plain = load_plain("")
        calls = {"patched": forward(patched(plain, run.backend)), "unpatched": forward(plain)}
    except Exception as error:  # no transformers, or nothing to patch with: the other figures still count
        run.keep(models=[])
        return [figure.line(reason=f"not available: {type(error).__name__}: {error}") for figure in CORE_MODEL_FIGURES]
    records: list[dict[str, Any]] = []
    allowed: list[Tolerance] = []
    lines = []
    for figure in CORE_MODEL_FIGURES:
        shape = figure.shape
        if run.quick and shape.length > 128:
            lines.append(run.judge(figure, None, None, "not in --quick"))
            continue
        batches = draw_batches(shape, plain.config.vocab_size)
        eager, truth = calls["unpatched"](batches[0]), truths(plain, {shape: batches[0]}).get(shape)
        allowed.append(tolerance(shape, batches[0], eager, truth, allowed))
        outcome = check_call(calls["patched"], eager, batches[0], truth, allowed[-1])
        checks = {"patched": {**outcome.as_json(), "text": outcome.text}}
        found: dict[str, Any] = {"model": "v3-base", "batch": 1, "length": shape.length, "checks": checks}
        if outcome.ok:
            pace = replace(run.pace, rounds=15, least=3, seconds=3.0 if run.quick else 20.0)
            samples = interleave({name: rotating(call, batches) for name, call in calls.items()}, pace)
            found["samples"] = {name: sample.as_json() for name, sample in samples.items()}
            note(f"model {shape.label}: {run.times(found['samples'])}")
        records.append(found)
        lines.append(run.judge(figure, found, needed_flops([shape.length], "model")))
    run.keep(models=records)
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 for a wrong answer of ours, or with --strict for a missed figure."""
    options = parse(arguments)
    name = Path(options.source).resolve().name if options.source else "v3-base, random weights"
    run = Run("memory" if options.memory else "model", options, model=name)
    run.measure_rates()
    if options.memory:
        measure_large(run)
        print(tables.text(run.result))
        return run.status
    largest = QUICK_TOKENS if run.quick else max(shape.batch * shape.length for shape in MODEL_SHAPES)
    shapes = [s for s in MODEL_SHAPES if s.dtype in (options.only or DTYPES) and s.batch * s.length <= largest]
    shapes.sort(key=lambda shape: (shape.batch * shape.length, shape.length))
    models = Models(options.source, run.backend)
    measure_shapes(run, models, shapes)
    if not options.no_peaks:
        measure_peaks(run, models, shapes)
    print(tables.text(run.result))
    return run.status
