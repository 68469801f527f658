"""The options of `bench --model`; torch is not imported for them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from deberta_kernels.demo.arguments import Parser, length, path, size, threads

__all__ = ["name_a_model", "parser"]

DTYPES = ("float32", "bfloat16", "float16")
TEXTS = 512
EPILOG = """Without --model the attention core is timed, on random numbers: deberta-kernels bench [--lengths 128,512]
[--threads N] [--seconds S]; in a checkout, the options of `python -m benchmarks core`, which its --help lists."""


def name_a_model(arguments: Sequence[str]) -> bool:
    """Tell whether the arguments of `bench` ask for a model, or for help, and not for the attention core."""
    options = ("--model", "--text", "-h", "--help")
    return any(given.partition("=")[0] in options for given in arguments)


def _limit(text: str) -> int:
    return 0 if text == "0" else size(text)


def parser() -> argparse.ArgumentParser:
    """Return the parser of `bench --model`, whose help tells of the attention core too."""
    made = Parser(
        prog="deberta-kernels bench",
        description="Measure a model of yours on texts of yours, as it is and patched, taking turns on this CPU.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    made.add_argument("--model", required=True, help="directory or hub id of a DeBERTa v1, v2 or v3, with any head")
    made.add_argument("--text", required=True, type=path, help="file: a text a line; or .csv, .tsv, .jsonl")
    made.add_argument("--column", help="column or key of the texts (default: the only one, or the one named text, ...)")
    made.add_argument("--limit", type=_limit, default=TEXTS, help=f"texts at most; 0: all (default: {TEXTS})")
    made.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of the weights, one or more")
    made.add_argument("--batch-size", type=size, default=8, help="texts in a batch (default: 8)")
    made.add_argument("--max-length", type=length, help="tokens at which a text is cut (default: the model's)")
    made.add_argument("--sort", action="store_true", help="sort the texts by length before they are batched")
    made.add_argument("--threads", type=threads, help="threads to compute with (default: torch's choice)")
    made.add_argument("--output", type=path, default=Path("bench-results"), help="folder for picture and numbers")
    return made
