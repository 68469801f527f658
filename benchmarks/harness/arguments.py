"""Types of command line options: values separated by commas, each of which is looked at before anything runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["existing_file", "existing_folder", "names", "numbers"]


def names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a type for some of the known names; none is an empty tuple."""
    every = tuple(known)

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(filter(None, text.split(",")))
        if unknown := sorted(set(found) - set(every)):
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; there are {', '.join(every)}")
        return found

    return parse


def numbers(text: str) -> tuple[int, ...]:
    """Return whole numbers from 1 on."""
    try:
        found = tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        found = (0,)
    if min(found, default=1) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1 on, separated by commas, got {text!r}")
    return found


def existing_file(text: str) -> Path:
    """Return the path of a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return Path(text)


def existing_folder(text: str) -> str:
    """Return the path of a folder that is there; "" where none is named."""
    if text and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return text
