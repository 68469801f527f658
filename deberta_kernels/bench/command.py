"""`deberta-kernels bench --model DIRECTORY_OR_ID --text FILE`: patched against stock, on the user's own work."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from deberta_kernels.bench import show, texts
from deberta_kernels.bench.batches import Batches, encode
from deberta_kernels.bench.checkpoint import Checkpoint, CheckpointError, load
from deberta_kernels.bench.compare import Measured, candidates, measure
from deberta_kernels.demo.arguments import missing_package
from deberta_kernels.demo.checkpoint import check_model
from deberta_kernels.demo.measure import MEMORY_METHOD, MeasurementError, can_measure
from deberta_kernels.demo.report import conditions, described
from deberta_kernels.demo.results import check_folder, write_json, write_picture

__all__ = ["run"]

NUMBERS, PICTURE = FILES = ("bench.json", "bench.png")
SECONDS_BETWEEN_LINES = 10.0  # of progress where nobody watches


class Progress:
    """Says on stderr what is done and how long the rest takes: in place on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self.begin = self.last = time.perf_counter()
        self.watched = sys.stderr.isatty()
        self.share = 0.0

    def __call__(self, share: float, what: str) -> None:
        now = time.perf_counter()
        if share == 0.0:
            self.begin = now
        left = (now - self.begin) * (1 - share) / share if share else 0.0
        text = f"[bench] {what}" + (f", about {left:.0f} s left" if 0 < share < 1 else "")
        if self.watched:
            print(f"\r{text:<70}", end="\n" if share == 1 else "", file=sys.stderr, flush=True)
        elif share in (0.0, 1.0) or now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            print(text, file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(f"[bench] {text}", file=sys.stderr, flush=True)


def _longest(options: argparse.Namespace, checkpoint: Checkpoint) -> int:
    config: Any = checkpoint.model.config
    most = config.max_position_embeddings
    if options.max_length is None:
        return checkpoint.longest
    if getattr(config, "position_biased_input", True) and options.max_length > most:
        raise CheckpointError(f"--max-length must be at most {most}, the model's positions, got {options.max_length}.")
    return int(options.max_length)


def _about_texts(options: argparse.Namespace, found: texts.Texts, batches: Batches) -> str:
    column = f", column {found.column}" if found.column else ""
    return (
        f"{'first ' if found.more else ''}{batches.texts} texts of {options.text.name}{column}, "
        f"{options.batch_size} a batch{', sorted by length' if options.sort else ''}, "
        f"up to {batches.longest} tokens, {batches.tokens / batches.padded:.0%} of them real"
    )


def _show(
    folder: Path, about: dict[str, Any], measured: list[Measured], counts: dict[str, Any], batches: Batches
) -> None:
    print(f"\n{show.format_table(measured, batches)}\n")
    print("\n".join(show.lines_of_dtypes(measured)) or f"all against {measured[0].name}")
    print(about["texts"])
    print(described(about) + f"; native library: {about['instruction_set'] or 'not there'}")
    print(f"time: of a batch, median of {counts['passes']} pass(es), the models taking turns; rates are by the clock")
    print(f"memory: of the batch with most scores; {MEMORY_METHOD}")
    print(f"difference: over real tokens of every output, whose values reach {measured[0].first.scale:.1f}")
    for reason, count in counts["fallbacks"].items():
        print(f"original code was used {count} times: {reason}")
    records = show.as_records(measured, batches)
    written = [write_json(folder / NUMBERS, {"conditions": about, **counts, "models": records})]
    try:
        written.insert(0, write_picture(folder / PICTURE, show.draw(about, measured, batches)))
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
    print("written: " + ", ".join(map(str, written)))


def _measured(options: argparse.Namespace) -> int:
    """Check, load, measure, show; every check that needs no model comes before it is loaded."""
    if not can_measure():
        raise CheckpointError("bench --model measures memory through /proc and needs Linux.")
    if missing := missing_package("transformers"):
        raise CheckpointError(missing)
    check_folder(options.output, *FILES)
    found = texts.read(options.text, options.column, options.limit)
    check_model(options.model)
    wanted = [getattr(torch, name) for name in dict.fromkeys(options.dtype)]
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(1)  # demo/measure.py: this process must stay free of threads
    _say(f"loading {options.model}")
    checkpoint = load(options.model, torch.float32 if torch.float32 in wanted else wanted[0])
    batches = encode(checkpoint, found.texts, options.batch_size, _longest(options, checkpoint), options.sort)
    models = candidates(checkpoint.model, wanted)
    about = conditions(checkpoint.name, wanted[0], threads)
    about |= {"dtype": ", ".join(options.dtype), "head": type(checkpoint.model).__name__, "memory": MEMORY_METHOD}
    about |= {"texts": _about_texts(options, found, batches), "remarks": list(checkpoint.remarks)}
    _say(f"{about['head']}; {about['texts']}")
    for remark in _remarks(checkpoint, found, batches):
        _say(remark)
    measured, counts = measure(models, batches, threads, Progress())
    _show(options.output, about, measured, counts, batches)
    return 0


def _remarks(checkpoint: Checkpoint, found: texts.Texts, batches: Batches) -> list[str]:
    remarks = list(checkpoint.remarks)
    if found.more:
        remarks.append(f"only the first {batches.texts} texts of the file; --limit 0 takes all")
    if found.skipped:
        remarks.append(f"{found.skipped} empty texts left out")
    if batches.cut:
        remarks.append(f"{batches.cut} texts cut at {batches.longest} tokens; --max-length changes that")
    return remarks


def run(options: argparse.Namespace) -> int:
    """Measure the user's model on the user's texts; return the process's exit status."""
    try:
        return _measured(options)
    except MeasurementError as error:
        reason = str(error).strip().splitlines()[-1]  # of a traceback, the error
        print(f"deberta-kernels bench: not measured: {reason}; try a smaller --batch-size.", file=sys.stderr)
    except (CheckpointError, texts.TextsError, OSError, ValueError, ImportError) as error:
        print(f"deberta-kernels bench: {error}", file=sys.stderr)
    return 1
