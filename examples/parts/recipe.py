"""A run from the command line to the model card."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from . import saving
from .card import card, versions
from .features import encode_all
from .labels import names_of
from .loop import Loop
from .model import build, core, resumed, save
from .options import parse
from .progress import duration
from .records import load
from .speed import compare, table
from .task import Data, InputError, Record, Task

__all__ = ["run"]


def run(task: Task, arguments: list[str] | None = None) -> int:
    """Train the task from the command line; return the exit code: 0 done, 2 bad input, 3 stopped to go on later."""
    try:
        options, state = parse(task, arguments)
        return _run(task, options, state)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _data(task: Task, options: argparse.Namespace) -> Data:
    """Read the records, hold a part out, and list the labels."""
    if options.data:
        records = load(options.data, task.columns, options, task.tidy, task.flatten)
    else:
        records = [
            {**record, "place": f"record {number}"} for number, record in enumerate(task.samples()[: options.limit])
        ]
    if options.validation:
        training, validation = records, load(options.validation, task.columns, options, task.tidy, task.flatten)
    else:
        training, validation = _hold_out(task, options, records)
    name = options.data or Path("the sample text")
    if wrong := task.check([*training, *validation]):
        raise InputError(f"{name}: {wrong}.")
    labels = names_of(training, validation, task.labels_of, name, options.validation) if task.labels_of else None
    return Data(training, validation, labels)


def _hold_out(task: Task, options: argparse.Namespace, records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Draw groups of records until their share is reached."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(task.group(record), []).append(record)
    keys = list(groups)
    random.Random(options.seed).shuffle(keys)
    wanted, held = max(round(options.validation_share * len(records)), 1), 0
    validation = set()
    for key in keys[:-1]:  # one group at least is left to train on
        if held >= wanted:
            break
        validation.add(key)
        held += len(groups[key])
    if not validation:
        raise InputError(
            f"{options.data} has {len(records)} usable row; no part of it can be held out. Give --validation FILE."
        )
    parts: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        parts[task.group(record) in validation].append(record)
    return parts


def _files(options: argparse.Namespace) -> dict[str, str | None]:
    return {name: saving.digest(getattr(options, name)) for name in ("data", "validation")}


def _run(task: Task, options: argparse.Namespace, state: dict[str, Any] | None) -> int:
    data = _data(task, options)
    files = _files(options)
    if state is not None:
        for name, known in state["files"].items():
            if known != files[name]:
                raise InputError(f"--{name} {getattr(options, name)} is not the file it was when this run began.")
    print(f"{len(data.training)} records to train on, {len(data.validation)} to evaluate on", flush=True)
    torch.manual_seed(options.seed)
    if state is None:
        model, encoder, numbers = build(task, options, data)
    else:
        model, encoder, numbers = resumed(task, options, state, options.output / saving.START)
    training = encode_all(task, options, encoder, data.training, numbers)
    validation = encode_all(task, options, encoder, data.validation, numbers)
    data.labels = _labels(core(model).config) if numbers else None
    loop = Loop(task, options, model, encoder, data, training, validation)
    if state is not None:
        loop.restore(state)
        saving.restore_random(state["random"])
        print(f"going on after step {loop.standing.step}")
    elif options.output:
        with saving.beside(options.output / saving.START) as folder:
            core(model).config.save_pretrained(folder)
            encoder.tokenizer.save_pretrained(folder)
    fixed = {"title": task.title, "options": saving.plain(options), "files": files, "numbers": numbers}
    return _train_and_report(task, loop, fixed)


def _labels(config: Any) -> list[str]:
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def _train_and_report(task: Task, loop: Loop, fixed: dict[str, Any]) -> int:
    options, output = loop.options, loop.options.output

    def save_state() -> None:
        if output:
            with saving.beside(output / saving.STATE) as partial:
                torch.save({**loop.state(), **fixed, "random": saving.random_state()}, partial)

    def save_best(metrics: dict[str, float]) -> None:
        if output:
            with saving.beside(output / saving.MODEL) as folder:
                save(loop.model, loop.encoder, folder)
                text = card(task, options, loop.data, metrics, loop.standing.step, None)
                (folder / "README.md").write_text(text, encoding="utf-8")

    if not loop.run(save_state, save_best):
        return _stopped(loop)
    standing = loop.standing
    metrics = next(found for found in standing.history if found["step"] == standing.best_step)
    metrics = {name: value for name, value in metrics.items() if name not in ("step", "training_loss")}
    rate = standing.tokens / standing.seconds
    print(
        f"{standing.step} steps in {duration(standing.seconds)}, {rate:,.0f} tokens/s; "
        f"best {options.metric}: {standing.best:.4g}"
    )
    speed = _speed(loop)
    if output:
        results = {
            "metrics": metrics, "best_step": standing.best_step, "steps": standing.step, "history": standing.history,
            "tokens_per_second": rate, "patched": not options.no_patch, "speed": speed, "versions": versions(),
            "files": fixed["files"], "options": fixed["options"],
        }  # fmt: skip
        text = card(task, options, loop.data, metrics, standing.best_step, speed)
        for path, content in (
            (output / saving.MODEL / "README.md", text),
            (output / saving.RESULTS, json.dumps(results, indent=1) + "\n"),
        ):
            with saving.beside(path) as partial:
                partial.write_text(content, encoding="utf-8")
        (output / saving.STATE).unlink(missing_ok=True)
        shutil.rmtree(output / saving.START, ignore_errors=True)
        print(f"model and card: {output / saving.MODEL}   results: {output / saving.RESULTS}")
    else:
        print("nothing was saved; --output DIR keeps model, card and results")
    return 0


def _stopped(loop: Loop) -> int:
    output = loop.options.output
    if output is None:
        print(f"stopped after step {loop.standing.step}; nothing was saved, since --output is not given")
    else:
        program = shlex.join([sys.executable, sys.argv[0], "--output", str(output), "--resume"])
        print(f"stopped after step {loop.standing.step} of {loop.total}; go on with:\n  {program}")
    return 3


def _speed(loop: Loop) -> dict[str, Any] | None:
    options = loop.options
    if options.no_patch or not options.comparison_seconds:
        return None
    print("timing this run's batches on the patched and the stock model ...", flush=True)
    steps = range(min(loop.total, loop.order.steps_per_epoch, 16))
    batches = [loop.batch(places, step) for step in steps for places in loop.order.step(step)]
    found = compare(
        loop.model,
        batches,
        lambda model, batch: loop.forward(model, batch).loss,
        options.device,
        options.comparison_seconds,
    )
    print(table(found))
    return found
