"""What the examples of inference share: texts, packages that may be missing, the stock model beside the patched one."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from os.path import expanduser
from pathlib import Path
from typing import Any

from parts.options import add_columns, check_device
from parts.progress import Progress
from parts.records import load
from parts.saving import beside
from parts.task import Column, InputError

import deberta_kernels as dk
from deberta_kernels.demo.arguments import path

__all__ = [
    "add_texts",
    "check_deberta",
    "in_batches",
    "load_model",
    "main",
    "package",
    "patch_and_run",
    "texts",
    "write",
]

TEXT = Column("text", "text", "the text")
ROUNDS = 3  # timed, of each model


def package(name: str, wanted: str) -> Any:
    """Import a package, or say how to install it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise InputError(f"this example needs {wanted}: pip install {wanted}") from error


def add_texts(parser: argparse.ArgumentParser, what: str, *, kind: str, model: str) -> None:
    """Add arguments for texts, given on the command line or in a file, and for a kind of model with its default."""
    parser.add_argument("texts", nargs="*", help=f"{what}, or --file")
    parser.add_argument("--file", type=path, help=f"file of {what}: .txt (one on each line), .csv, .tsv, .jsonl, .json")
    add_columns(parser, [TEXT])
    found = f"hub id or folder of {kind} (default: {model})"
    parser.add_argument("--model", type=expanduser, default=model, help=found)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=path, help="JSON lines with the results; default: print them")
    parser.add_argument("--no-patch", action="store_true", help="run the stock model")
    parser.add_argument("--compare", action="store_true", help="run the stock model too; print difference and speed-up")


def texts(options: argparse.Namespace) -> list[str]:
    """Return the texts; check the other options that all examples have."""
    if bool(options.texts) == bool(options.file):
        raise InputError("give texts on the command line, or a file of them with --file (one of the two).")
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {options.batch_size}.")
    if options.compare and options.no_patch:
        raise InputError("--compare runs the patched and the stock model; leave --no-patch out.")
    if options.output and options.output.is_dir():
        raise InputError(f"--output {options.output} must be a file, got a folder.")
    check_device(options.device)
    if options.texts:
        return list(options.texts)
    return [str(record["text"]) for record in load(options.file, [TEXT], options)]


def load_model(name: str, make: Callable[[], Any]) -> Any:
    """Load a model, with a short error where there is none."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return make()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"--model {name} cannot be loaded; give the folder of a checkpoint or its hub id. The reason: {reason}"
        ) from error


def check_deberta(model: Any, name: str) -> None:
    """Say so before any work where there is nothing to patch."""
    try:
        dk.patch(model)
        dk.unpatch(model)
    except ValueError as error:
        raise InputError(f"--model {name} holds no DeBERTa; --no-patch runs it as it is.") from error


def in_batches(items: Sequence[Any], size: int, what: str, run: Callable[[Sequence[Any]], Iterable[Any]]) -> list[Any]:
    """Run a function over batches; show how many are done and the time left."""
    found: list[Any] = []
    with Progress(len(items), what) as progress:
        for start in range(0, len(items), size):
            found += run(items[start : start + size])
            progress.at(min(start + size, len(items)))
    return found


def patch_and_run(
    model: Any, options: argparse.Namespace, run: Callable[[], list[Any]], difference: Callable[[Any, Any], str]
) -> list[Any]:
    """Return the results of the patched model; with --compare tell how far from the stock model's.

    Args:
        model: stock.
        options: of the command line.
        run: computes the results.
        difference: stock results, patched results -> what differs, in words.
    """
    if options.no_patch:
        return run()
    check_deberta(model, options.model)
    if not options.compare:
        dk.patch(model)
        return run()
    changes = {"stock": dk.unpatch, "patched": dk.patch}
    found, seconds = {}, {"stock": list[float](), "patched": list[float]()}
    for number in range(ROUNDS + 1):  # the first is not timed
        for kind, change in changes.items():
            change(model)
            start = time.perf_counter()
            found[kind] = run()
            if number:
                seconds[kind].append(time.perf_counter() - start)
    stock, patched = (sorted(seconds[kind])[ROUNDS // 2] for kind in ("stock", "patched"))
    print(f"stock {stock:.2f} s, patched {patched:.2f} s: {stock / patched:.2f} times the speed", file=sys.stderr)
    print(difference(found["stock"], found["patched"]), file=sys.stderr)
    return found["patched"]


def write(output: Path | None, results: list[dict[str, Any]], line: Callable[[dict[str, Any]], str]) -> None:
    """Print results, or write them as JSON lines; the file is there when all of them are."""
    if output is None:
        for result in results:
            print(line(result))
        return
    with beside(output) as partial:
        partial.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in results), encoding="utf-8")
    print(f"{len(results)} results in {output}", file=sys.stderr)


def main(run: Callable[[list[str] | None], None], arguments: list[str] | None = None) -> int:
    """Run an example; return its exit code, 2 for bad input."""
    with suppress(BrokenPipeError):  # into head
        try:
            run(arguments)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0
