"""Memory that a whole model needs beyond its weights and inputs, in a process of its own."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.figures import Line
from benchmarks.harness.process import run_alone
from benchmarks.harness.record import Progress, Run
from benchmarks.harness.tables import MEGABYTE
from benchmarks.model.batches import Batch, draw_batches
from benchmarks.model.checking import check_call, tolerance, truths
from benchmarks.model.rivals import Models, build, candidate_names, load_plain, patched
from benchmarks.registry import CANDIDATES, LARGE, MODEL_SHAPES, RUNTIMES, Large, ModelShape
from deberta_kernels.testing.geometries import settings
from deberta_kernels.testing.memory import free, peak

__all__ = ["measure_candidate", "measure_large", "measure_large_alone", "measure_peaks"]

WARM_UP = 8  # tokens
# Short, long and ragged: a process for each candidate takes its time, and the other sizes follow from these.
PEAK_SIZES = ((1, 512), (1, 2048))
PEAK_SHAPES = tuple(
    shape
    for shape in MODEL_SHAPES
    if shape.dtype == "float32" and (shape.fill < 1.0 or (shape.batch, shape.length) in PEAK_SIZES)
)
CHECKED_LAYERS = 3
GROWTH_MUST = 2.2
# The growth is that of the tokens' own states; scores for every pair would quadruple.
GROWTH = ("layer-16384", "layer-32768")


def measure_peaks(run: Run, models: Models, shapes: list[ModelShape]) -> None:
    """Measure the peak extra memory of every candidate of the `PEAK_SHAPES` among those, in fresh processes."""
    records = []
    chosen = [shape for shape in shapes if shape in PEAK_SHAPES]
    progress = Progress(500 + shape.batch * shape.length for shape in chosen)
    for shape in chosen:
        found: dict[str, Any] = {**shape.__dict__, "label": shape.label, "bytes": {}}
        for name in candidate_names(shape):
            if CANDIDATES["model"][name].missing:
                continue
            exported = str(models.exported()) if name in RUNTIMES else ""
            chosen_model = {"name": name, "backend": run.backend, "source": models.source, "exported": exported}
            outcome = run_alone(measure_candidate, run.threads, shape=shape.__dict__, **chosen_model)
            found["bytes"][name] = outcome.get("bytes", outcome.get("error"))
        progress.step(f"peak memory {shape.label} {shape.dtype}: {found['bytes']}")
        records.append(found)
    run.keep(peaks=records)


def measure_large(run: Run) -> None:
    """Measure the `LARGE` cases; one for which there is too little free memory is left out, and says so."""
    records: list[dict[str, Any]] = []
    lines: list[Line] = []
    found: dict[str, dict[str, Any]] = {}
    # A loaded model, and pairs of tokens in every layer.
    skipped = set(LARGE) - set(GROWTH) if run.quick else set()
    measured = [x for name, x in LARGE.items() if name not in skipped]
    progress = Progress(1e9 + x.length**2 * x.settings.get("num_hidden_layers", 12) for x in measured)
    for name, large in LARGE.items():
        if name in skipped:
            outcome: dict[str, Any] = {"error": "not in --quick"}
        elif free() < large.needs:
            outcome = {"error": f"{free() / 1e9:.1f} GB of memory are free, {large.needs / 1e9:.0f} needed"}
        else:
            outcome = run_alone(measure_large_alone, run.threads, name=name, backend=run.backend)
        found[name] = outcome
        # A file says what differs from the model of all other measurements.
        sizes, usual = settings(large.model, **large.settings), settings("v3-base", vocab_size=1024)
        differing = {key: value for key, value in sizes.items() if usual.get(key) != value}
        records.append({"name": name, **large.__dict__, "settings": differing, **outcome})
        if name not in skipped:
            progress.step(f"{name}: {outcome}")
        lines.append(_large_line(large, outcome))
    growth = [found[name] for name in GROWTH]
    values: dict[str, Any] = {"reason": "not available: a case before it failed"}
    if not any("error" in x for x in growth):
        ratio = growth[1]["bytes"] / growth[0]["bytes"]
        values = {"median": ratio, "best": ratio}
    title = "the same, twice the length over the length (N^2 would be 4)"
    lines.insert(len(GROWTH) + 1, Line("memory", title, "1x32768 float32", GROWTH_MUST, None, False, "", **values))
    run.keep(lines, memory=records)


def _large_line(large: Large, outcome: dict[str, Any]) -> Line:
    values: dict[str, Any] = {"reason": f"not available: {outcome['error']}"} if "error" in outcome else {}
    if not values:
        highest = outcome["bytes"] + (outcome["weights"] if large.eager else 0)
        values = {"median": highest / MEGABYTE, "best": highest / MEGABYTE}
        if outcome.get("red"):
            values = {"reason": f"RED: {outcome['red']}"}
    must = None if large.must is None else large.must / MEGABYTE
    title = large.title if large.eager else f"{large.title}, peak above the weights"
    return Line("memory", title, f"{large.batch}x{large.length} {large.dtype}", must, None, False, "MB", **values)


def measure_candidate(shape: dict[str, Any], name: str, backend: str, source: str, exported: str) -> dict[str, Any]:
    """Measure one candidate on one batch in this process."""
    chosen = ModelShape(**shape)
    plain = None
    if name not in RUNTIMES:
        plain = load_plain(source).to(getattr(torch, chosen.dtype))
    call = build(name, chosen, plain, Path(exported), backend)
    batch = draw_batches(chosen, 1024, 1)[0]
    if plain is not None:
        if name == "bert":
            del plain
        call(batch.first(1, WARM_UP))
    # The runtimes start their threads when they load, and OpenVINO is compiled for one size.
    return peak(lambda: [call(batch)])


def _random_model(large: Large) -> Any:
    """Return a model with random weights that were never in another dtype, so that the largest fits."""
    from transformers import DebertaV2Config, DebertaV2Model

    with torch.device("meta"):
        model = DebertaV2Model(DebertaV2Config(**settings(large.model, **large.settings)))
    model = model.to(getattr(torch, large.dtype)).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        for name, buffer in model.named_buffers():
            if not name.endswith("position_ids"):
                raise RuntimeError(f"the buffer {name} has no value")
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return model


def measure_large_alone(name: str, backend: str) -> dict[str, Any]:
    """Measure one `LARGE` case in this process."""
    large = LARGE[name]
    started = time.perf_counter()
    plain = _random_model(large)
    loaded = time.perf_counter() - started
    model = patched(plain, backend, unpad="auto")
    batch = draw_batches(ModelShape(large.batch, large.length, large.dtype), 1024, 1)[0]

    def run(one: Any, part: Batch) -> Any:
        with torch.no_grad():
            return one(input_ids=part.input_ids, attention_mask=part.attention_mask)[0]

    run(model, batch.first(1, WARM_UP))
    started = time.perf_counter()
    kept: list[Any] = []

    def call() -> list[Any]:
        kept.append(run(model, batch))
        return kept

    outcome = peak(call)
    outcome["weights"] = sum(x.numel() * x.element_size() for x in plain.parameters())
    outcome["parameters"] = sum(x.numel() for x in plain.parameters())
    outcome["seconds"] = {"loading": round(loaded, 1), "forward": round(time.perf_counter() - started, 1)}
    if not bool(kept[0].isfinite().all()):
        outcome["red"] = "the result is not finite"
    if large.eager:
        if problem := _wrong_answer(plain, large, backend):
            outcome["red"] = problem
        expected: list[Any] = []
        unpatched = peak(lambda: expected.append(run(plain, batch)) or expected)
        outcome["unpatched_bytes"] = unpatched["bytes"]
        outcome["difference_from_unpatched"] = float((kept[0].float() - expected[0].float()).abs().max())
        outcome["largest_value"] = float(expected[0].float().abs().max())
    return outcome


def _wrong_answer(plain: Any, large: Large, backend: str) -> str:
    """Check the first layers alone, for float64 of all would not fit; return what is wrong, or ""."""
    shared: dict[int, Any] = {id(x): x for x in (*plain.parameters(), *plain.buffers())}
    short = copy.deepcopy(plain, shared)
    short.encoder.layer = short.encoder.layer[:CHECKED_LAYERS]
    shape = ModelShape(large.batch, large.length, large.dtype)
    batch = draw_batches(shape, 1024, 1)[0]
    eager = build("eager", shape, short, None, backend)(batch)
    truth = truths(short, {shape: batch})[shape]
    limits = tolerance(shape, batch, eager, truth, [])
    outcome = check_call(build("patched", shape, short, None, backend), eager, batch, truth, limits)
    return "" if outcome.ok else outcome.text
