"""Time real texts in tokens per second: padding costs time and counts for nothing.

python -m benchmarks texts --threads 1              random weights in v3-base geometry, six minutes; make bench-texts
python -m benchmarks texts DIRECTORY --threads 1    a local checkpoint, with its tokenizer
python -m benchmarks texts --quick --threads 1      sentences alone, few rounds
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.harness import record, tables, throughput
from benchmarks.harness.arguments import existing_folder
from benchmarks.harness.clock import Pace, interleave
from benchmarks.harness.process import note
from benchmarks.harness.record import Progress, Run
from benchmarks.model.batches import Batch
from benchmarks.model.checking import Tolerance, Truth, check_call, tolerance, truths
from benchmarks.model.rivals import Call, Models
from benchmarks.registry import CANDIDATES, ROUGH, TEXTS, ModelShape, Texts
from benchmarks.texts.collection import Collection, collect
from benchmarks.texts.rivals import INT8, build
from deberta_kernels.demo.model import find_encoder
from deberta_kernels.demo.text import Encoder, hashing_encoder

__all__ = ["main"]

# A call takes seconds, and has run before, when it was checked.
PACE, QUICK_PACE = Pace(rounds=9, least=3, seconds=90.0, block=0.0), Pace(rounds=2, least=1, seconds=1.0, block=0.0)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = record.options("texts", __doc__, strict=False)
    parser.add_argument(
        "source", nargs="?", default="", type=existing_folder, help="directory of a DeBERTa-v2 or v3 checkpoint"
    )
    return parser.parse_args(arguments)


def encoder(models: Models) -> Encoder:
    """Return text to token ids: the checkpoint's tokenizer, or one that hashes words where there is none."""
    vocabulary = models.plain("float32").config.vocab_size
    if not models.source:
        return hashing_encoder(vocabulary)
    encode, remark = find_encoder(models.source, vocabulary)
    if remark:
        note(remark)
    return encode


def built(models: Models) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the forwards of the candidates, and why others have none."""
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name, candidate in CANDIDATES["texts"].items():
        if candidate.missing:
            missing[name] = candidate.missing
            continue
        try:
            calls[name] = build(name, models)
        except Exception as error:  # a rival that cannot be built leaves the others to be measured
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        note(f"{name}: {missing.get(name, 'ready')}")
    return calls, missing


def rough_check(call: Call, batches: list[Batch], eager: list[Tensor], most: float) -> dict[str, Any]:
    """Compare a candidate of a less exact dtype with eager, on real tokens."""
    wrong = power = 0.0
    try:
        for batch, expected in zip(batches, eager, strict=True):
            real = batch.attention_mask.bool()
            right = expected[real].double()
            wrong += float((call(batch)[real].double() - right).square().sum())
            power += float(right.square().sum())
    except Exception as error:  # the others are still timed
        return {"ok": False, "text": f"{type(error).__name__}: {error}"}
    error_share = math.sqrt(wrong / power)
    text = f"root mean square of the error over that of the answers {error_share:.3g}, allowed {most}"
    share = round(error_share, 5) if math.isfinite(error_share) else None  # JSON has no NaN
    return {"ok": error_share <= most, "text": text, "error_share": share}


def exact_check(
    call: Call, batches: list[Batch], eager: list[Tensor], truth: Truth | None, allowed: Tolerance
) -> dict[str, Any]:
    """Hold a float32 candidate to the error budget on each batch, the first one against float64 as well."""
    found = {}
    for number, (batch, expected) in enumerate(zip(batches, eager, strict=True)):
        outcome = check_call(call, expected, batch, truth if number == 0 else None, allowed)
        found = {**outcome.as_json(), "text": outcome.text}
        if not outcome.ok:
            break
    return found


def prove(models: Models, calls: dict[str, Call], batches: list[Batch]) -> tuple[dict[str, Any], Tolerance]:
    """Run every candidate once and hold its answers to what its dtype allows."""
    plain = models.plain("float32")
    eager = [calls["eager"](batch) for batch in batches]
    shape = ModelShape(*batches[0].input_ids.shape)
    truth = truths(plain, {shape: batches[0]}).get(shape)
    allowed = tolerance(shape, batches[0], eager[0], truth, [])
    checks: dict[str, Any] = {}
    for name, call in calls.items():
        dtypes = CANDIDATES["texts"][name].dtypes
        if name in ("eager", "sorted"):
            continue  # the yardstick itself
        if not dtypes:
            call(batches[0])  # another model: nothing to compare with, and a first call that is not timed
        elif dtypes[0] in ROUGH:
            checks[name] = rough_check(call, batches, eager, ROUGH[dtypes[0]])
        else:
            checks[name] = exact_check(call, batches, eager, truth, allowed)
    return checks, allowed


def tokens(batches: list[Batch]) -> int:
    """Return the real tokens."""
    return sum(int(batch.attention_mask.sum()) for batch in batches)


def measure(models: Models, texts: Texts, collection: Collection, calls: dict[str, Call], pace: Pace) -> dict[str, Any]:
    """Check and time every candidate on the texts of one case."""
    arriving = collection.arriving[: texts.timed]
    checks, allowed = prove(models, calls, arriving)
    for name, outcome in checks.items():
        note(f"{name}: {'right' if outcome['ok'] else 'WRONG, not timed'}: {outcome['text']}")
    work = {name: collection.by_length if name == "sorted" else arriving for name in calls}
    right = {name: call for name, call in calls.items() if checks.get(name, {"ok": True})["ok"]}

    def turn(name: str) -> Any:
        return lambda _: [right[name](batch) for batch in work[name]]

    samples = interleave({name: turn(name) for name in right}, pace)
    return {
        "name": texts.name,
        "title": texts.title,
        "lengths": [batch.attention_mask.sum(1).tolist() for batch in collection.arriving],
        "tokens": {name: tokens(work[name]) for name in right},
        "tolerance": allowed.as_json(),
        "checks": checks,
        "samples": {name: sample.as_json() for name, sample in samples.items()},
    }


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 for a wrong answer of ours, int8 left out, whose error is the quantiser's."""
    options = parse(arguments)
    name = Path(options.source).resolve().name if options.source else "v3-base shape, random weights"
    run = Run("texts", options, model=name, int8=INT8)
    models = Models(options.source, run.backend)
    encode = encoder(models)
    calls, missing = built(models)
    cases = [texts for texts in reversed(TEXTS) if not (run.quick and texts.long)]  # short ones first
    progress = Progress(1 + 4 * texts.long for texts in cases)
    records: list[dict[str, Any]] = []
    for texts in cases:
        found = measure(models, texts, collect(texts, encode), calls, QUICK_PACE if run.quick else PACE)
        records.insert(0, {**found, "missing": missing})
        run.keep(texts=records, complete=len(records) == len(cases))
        speeds = {name: throughput.rate(found, name, run.threads) for name in found["samples"]}
        progress.step(f"{texts.title}: " + ", ".join(f"{name} {speed:.0f}/s" for name, speed in speeds.items()))
    print(tables.text(run.result))
    exact = [name for name in throughput.OURS if name not in INT8]
    ours = [x["checks"].get(name, {"ok": True})["ok"] for x in records for name in exact]
    return int(not all(ours))
