"""The options of the commands, and what is wrong with them; nothing here needs torch, so that errors come at once."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import NoReturn

from deberta_kernels.backends import BACKENDS

__all__ = [
    "BACKEND_NAMES",
    "DEFAULT_MODEL",
    "LENGTHS",
    "QUICK_LENGTHS",
    "Parser",
    "add_demo_arguments",
    "file_name",
    "length",
    "lengths",
    "missing_package",
    "path",
    "probability",
    "seconds",
    "size",
    "threads",
]

DEFAULT_MODEL = "microsoft/deberta-v3-base"
LENGTHS = (64, 128, 256, 512, 1024)
QUICK_LENGTHS = (64, 128, 256)
SHORTEST = 3  # [CLS], one token of text, [SEP]
LARGEST = 2**31 - 1
MOST_THREADS = 1024  # torch ends in a crash where the system does not give it as many
LONGEST_NAME = 200  # bytes; file systems take 255 with what is added
BACKEND_NAMES = ("auto", *BACKENDS)
# What each package comes with, as pip installs it.
_DEMO = '"deberta-kernels[demo]"'
_INSTALLS = {"torch": "torch", "transformers": _DEMO, "sentencepiece": _DEMO, "google.protobuf": _DEMO}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the command that shows the options."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` shows the options\n")


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demo."""
    parser.add_argument(
        "model",
        nargs="?",
        help=f"hub id or local directory of a DeBERTa-v2 or v3 (default: {DEFAULT_MODEL}, or random weights offline)",
    )
    parser.add_argument("--lengths", type=lengths, help=f"tokens, comma-separated (default: {_join(LENGTHS)})")
    parser.add_argument("--max-length", type=length, help="leave out longer inputs; a longer one than the list adds it")
    parser.add_argument("--quick", action="store_true", help=f"lengths {_join(QUICK_LENGTHS)}, fewer repetitions")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--threads", type=threads, help="threads to compute with (default: torch's choice)")
    parser.add_argument("--backend", choices=BACKEND_NAMES, default="auto", help="of the patched model (default: auto)")
    parser.add_argument("--output", type=path, default=Path("demo-results"), help="folder for picture and numbers")
    parser.add_argument("--name", type=file_name, default="demo", help="of picture and numbers, without ending")


def _join(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def path(text: str) -> Path:
    """Return a path; the shell leaves a ~ behind an equals sign as it is."""
    return Path(text).expanduser()


def size(text: str) -> int:
    """Return a whole number of at least 1."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and 1 <= int(text) <= LARGEST):
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to {LARGEST}, got {text!r}")
    return int(text)


def threads(text: str) -> int:
    """Return a number of threads."""
    if size(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to {MOST_THREADS}, got {text!r}")
    return int(text)


def lengths(text: str) -> tuple[int, ...]:
    """Return lengths that are separated by commas."""
    return tuple(length(part.strip()) for part in text.split(","))


def length(text: str) -> int:
    """Return a number of tokens that has room for a text."""
    tokens = size(text)
    if tokens < SHORTEST:
        raise argparse.ArgumentTypeError(f"must be {SHORTEST} tokens or more, got {text!r}: [CLS], one of text, [SEP]")
    return tokens


def seconds(text: str) -> float:
    """Return a time above 0."""
    value = _number(text)
    if not 0 < value < LARGEST:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value


def probability(text: str) -> float:
    """Return a probability of dropping."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")  # within no bounds


def file_name(text: str) -> str:
    """Return a name of files that lie in the folder of --output, not elsewhere."""
    if not text or Path(text).name != text or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"must be a file name without folders, got {text!r}; --output has the folder")
    if len(os.fsencode(text)) > LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"must be a name of at most {LONGEST_NAME} bytes, got {text[:20]!r} ...")
    return text


def missing_package(*names: str) -> str | None:
    """Return which of these packages is not installed, and how to install it; None when all are."""
    for name in names:
        try:
            found = importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):  # nor what it is a part of; or only its name stands in sys.modules
            found = False
        if not found:
            return f"{name} is not installed; run `pip install {_INSTALLS[name]}`"
    return None
