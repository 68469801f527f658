"""Results written beside and renamed, so that what lies under its name is whole; and all that a run needs to go on."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .task import InputError

__all__ = [
    "MODEL",
    "RESULTS",
    "START",
    "STATE",
    "beside",
    "check_output",
    "digest",
    "load_state",
    "plain",
    "random_state",
    "restore_random",
]

STATE, MODEL, RESULTS = "last.pt", "model", "results.json"
START = "start"  # folder of configuration and tokenizer, which a resumed run begins with


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give a path to write a file or folder to; it takes the name of `path` when all is written, and only then."""
    partial, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
    _remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        _remove(partial)
        raise
    if path.is_dir():  # a folder with files in it cannot be replaced in one go
        _remove(old)
        path.rename(old)
    os.replace(partial, path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(path: Path | None) -> str | None:
    """Return the SHA-256 of a file, by which a resumed run knows its data."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else None


def check_output(output: Path | None, resume: bool) -> None:
    """Look at the output folder before any work.

    Raises:
        InputError: it holds something already, or nothing to resume from.
    """
    if resume:
        if output is None:
            raise InputError("--resume needs --output DIR, the folder of the run that goes on.")
        if not (output / STATE).exists():
            done = (output / RESULTS).exists()
            reason = (
                f"the run is finished, its model is in {output / MODEL}" if done else f"there is no {output / STATE}"
            )
            raise InputError(f"nothing to resume in {output}: {reason}. Start a run without --resume.")
        if not (output / START).is_dir():
            raise InputError(f"{output / START} is missing, without which the run in {output} cannot go on.")
        return
    if output is None:
        return
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} must be a folder, got a file.")
    if output.is_dir() and any(output.iterdir()):
        hint = " Go on with the run in it: --resume." if (output / STATE).exists() else ""
        raise InputError(f"--output {output} is not empty; name another folder.{hint}")
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--output {output} cannot be made: {there} is no folder that can be written to.")


def load_state(output: Path, device: str = "cpu") -> dict[str, Any]:
    """Return what an earlier run left in `output`."""
    old, model = output / f".{MODEL}.old", output / MODEL
    if old.is_dir() and not model.exists():  # the run ended between two renames
        old.rename(model)
    try:
        return dict(torch.load(output / STATE, map_location=device, weights_only=True))
    except Exception as error:  # torch raises what its unpickler does
        raise InputError(f"{output / STATE} cannot be read: {str(error).splitlines()[0]}") from error


def random_state() -> dict[str, Any]:
    """Return the state of PyTorch's generators, from which the dropouts are drawn."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random(state: dict[str, Any]) -> None:
    """Put the generators back."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


def plain(options: argparse.Namespace) -> dict[str, Any]:
    """Return options as what torch.load takes without trust."""
    return {name: str(x) if isinstance(x, Path) else x for name, x in vars(options).items()}
