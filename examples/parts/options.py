"""The command line of a training example; a resumed run takes what it is not told from the run it goes on with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch

from deberta_kernels.demo.arguments import path

from .saving import check_output, load_state
from .task import InputError, Task

__all__ = ["add_columns", "check_device", "parse"]

LEARNING_RATE, LEARNING_RATE_OF_NEW = 2e-5, 3e-4  # of a checkpoint, of a small model that starts from nothing
PATHS = ("data", "validation", "output")
# What may differ when a run goes on: it changes no weight.
FREE = {"resume", "output", "save_every", "stop_after", "comparison_seconds"}


def _number(kind: type, low: float, high: float = float("inf"), above: bool = False) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if value < low or value > high or (above and value == low):
            limits = f"above {low}" if above else f"at least {low}"
            raise argparse.ArgumentTypeError(
                f"must be {limits}{f' and at most {high}' if high < float('inf') else ''}, got {text}"
            )
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


_COUNT, _POSITIVE, _AT_LEAST_ZERO = _number(int, 1), _number(float, 0, above=True), _number(float, 0)


def add_columns(parser: Any, columns: Any) -> None:
    """Add an option for the name of each column, and what to do with rows that cannot be used."""
    for column in columns:
        name = f"--{column.name.replace('_', '-')}-column"
        parser.add_argument(name, metavar="NAME", help=f"{column.help} (default: {column.default})")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows that are empty or wrong")
    parser.add_argument("--limit", type=_COUNT, metavar="ROWS", help="read only the first rows of each file")


def _parser(task: Task) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"{task.title}: fine-tune a DeBERTa on a file of your own. Without --data it trains on text that "
        "comes with the package, without --model a small model that starts from nothing.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=path, help="file to train on: .csv, .tsv, .jsonl, .json, .txt")
    data.add_argument("--validation", type=path, help="file to evaluate on; default: a part of --data is held out")
    data.add_argument("--validation-share", type=_number(float, 0, 0.9, above=True), default=0.1, metavar="SHARE")
    add_columns(data, task.columns)
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    _add_results(parser.add_argument_group("evaluation and results"), task)
    task.add_options(parser.add_argument_group("this task"))
    return parser


def _add_model(model: Any) -> None:
    model.add_argument("--model", type=expanduser, help="hub id or directory of a checkpoint")
    model.add_argument("--new-head", action="store_true", help="drop the checkpoint's own labels and start a new head")
    model.add_argument("--length", type=_number(int, 8), default=256, help="longest row, in tokens (default: 256)")
    model.add_argument("--no-patch", action="store_true", help="train the stock model")
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    model.add_argument("--checkpointing", action="store_true", help="save memory: compute layers again in the backward")
    model.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of autocast; weights: float32",
    )


def _add_training(training: Any) -> None:
    training.add_argument("--epochs", type=_COUNT, default=3)
    training.add_argument("--steps", type=_COUNT, help="steps of the optimizer, in place of --epochs")
    training.add_argument("--batch-size", type=_COUNT, default=8)
    training.add_argument("--accumulation", type=_COUNT, default=1, help="batches per step of the optimizer")
    training.add_argument(
        "--learning-rate", type=_POSITIVE,
        help=f"highest (default: {LEARNING_RATE} for a checkpoint, {LEARNING_RATE_OF_NEW} for a new model)",
    )  # fmt: skip
    training.add_argument("--schedule", choices=("linear", "cosine", "constant"), default="linear")
    training.add_argument(
        "--warmup", type=_number(float, 0, 1), default=0.1, metavar="SHARE", help="of all steps (default: 0.1)"
    )
    training.add_argument("--weight-decay", type=_AT_LEAST_ZERO, default=0.01)
    training.add_argument("--clip", type=_AT_LEAST_ZERO, default=1.0, help="largest norm of the gradient; 0: any")
    training.add_argument("--seed", type=_number(int, 0, 2**31), default=0)


def _add_results(results: Any, task: Task) -> None:
    results.add_argument("--output", type=path, metavar="DIR", help="folder for model, card and results; default: none")
    results.add_argument("--evaluate-every", type=_COUNT, metavar="STEPS", help="default: after each epoch")
    results.add_argument("--metric", choices=task.metrics, default=task.metrics[0], help="that the best is chosen by")
    results.add_argument(
        "--patience", type=_number(int, 0), default=3, metavar="N",
        help="stop after so many evaluations without a better one (default: 3; 0: never)",
    )  # fmt: skip
    results.add_argument("--save-every", type=_COUNT, metavar="STEPS", help="for --resume; default: at each evaluation")
    results.add_argument(
        "--stop-after", type=_COUNT, metavar="STEPS", help="save and leave after so many, to go on later"
    )
    results.add_argument("--resume", action="store_true", help="go on with the run in --output, bit for bit")
    results.add_argument(
        "--comparison-seconds", type=_AT_LEAST_ZERO, default=60.0, metavar="SECONDS",
        help="for timing this run's batches on the patched and the stock model (default: 60; 0: none)",
    )  # fmt: skip


def parse(task: Task, arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Return the options, and the state of the run that goes on with --resume.

    Raises:
        InputError: an option cannot be used, or differs from that of the run that goes on.
    """
    parser = _parser(task)
    options = parser.parse_args(arguments)
    check_output(options.output, options.resume)
    state = None
    if options.resume:
        state = load_state(options.output)
        if state["title"] != task.title:
            raise InputError(f"{options.output} holds a run of another example: {state['title']}.")
        saved = {name: Path(x) if name in PATHS and x else x for name, x in state["options"].items()}
        # A saved option stands in for the default of one that is not given.
        kept = {name: x for name, x in saved.items() if name not in ("resume", "stop_after")}
        options = parser.parse_args(arguments, argparse.Namespace(**kept))
        for name, value in saved.items():
            if name not in FREE and getattr(options, name) != value:
                option = "--" + name.replace("_", "-")
                raise InputError(
                    f"{option} was {value} when this run began, got {getattr(options, name)}; a resumed run keeps its "
                    f"options. Leave {option} out, or start a new run in another folder."
                )
    _check(options)
    return options, state


def check_device(name: str) -> None:
    """Raise InputError where this PyTorch has no such device."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used, try --device cpu: {str(error).splitlines()[0]}") from error


def _check(options: argparse.Namespace) -> None:
    for option in ("validation",):
        if getattr(options, option) and not options.data:
            raise InputError(f"--{option} needs --data, the file to train on.")
    if options.new_head and not options.model:
        raise InputError("--new-head needs --model; without it the head is new already.")
    if options.stop_after and not options.output:
        raise InputError("--stop-after needs --output DIR, where the run can go on from.")
    check_device(options.device)
    if options.precision == "float16" and torch.device(options.device).type == "cpu":
        print("float16 on a CPU is slow and can overflow; --precision bfloat16 is meant for it.")
    if options.learning_rate is None:
        options.learning_rate = LEARNING_RATE if options.model else LEARNING_RATE_OF_NEW
