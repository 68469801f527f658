"""Command line: `python -m deberta_kernels demo | info | bench | explain`, also installed as `deberta-kernels`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deberta_kernels import env

__all__ = ["main"]

MASKS = ("none", "key", "pair")
DTYPES = ("float32", "bfloat16", "float16", "float64")  # those of `dtypes`, which would import torch for --help


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    from .demo.runner import add_arguments

    top = argparse.ArgumentParser(prog="deberta-kernels", description="Fused disentangled attention for DeBERTa.")
    commands = top.add_subparsers(dest="command", required=True, metavar="demo | info | bench | explain")
    demo = commands.add_parser("demo", help="measure a DeBERTa on real text before and after patching")
    add_arguments(demo)
    commands.add_parser("info", help="say what is installed, which backends are active, and why")
    commands.add_parser(
        "bench",
        help="measure a model of yours on texts of yours (--model, --text); without --model, time the attention core",
        add_help=False,
    )
    explain = commands.add_parser("explain", help="say which backend would run a call, and why not the others")
    explain.add_argument("--batch", type=_size, default=1, help="B")
    explain.add_argument("--heads", type=_size, default=12, help="H")
    explain.add_argument("--length", type=_size, default=512, help="N, queries and keys")
    explain.add_argument("--head-dim", type=_size, default=64, help="D")
    explain.add_argument("--dtype", choices=DTYPES, default="float32")
    explain.add_argument("--device", default="cpu", help="a torch device, such as cpu or cuda:0")
    explain.add_argument("--mask", choices=MASKS, default="none", help="none, per key (B, N), per pair (B, 1, N, N)")
    explain.add_argument("--dropout", type=float, default=0.0, help="probability in [0, 1)")
    explain.add_argument("--position-buckets", type=int, default=256)
    explain.add_argument("--max-relative-positions", type=int, default=512)
    explain.add_argument("--no-position", action="store_true", help="neither c2p nor p2c")
    explain.add_argument("--backend", default="auto")
    return top


def show_info() -> int:
    """Print the state of the installation."""
    from .info import format_info

    print(format_info())
    return 0


def show_explanation(options: argparse.Namespace) -> int:
    """Print which backend would run a call of the given shape."""
    import torch

    import deberta_kernels as dk

    try:
        dtype: torch.dtype = getattr(torch, options.dtype)
        place: dict[str, Any] = {"dtype": dtype, "device": torch.device(options.device)}
        # Only shapes, dtypes and devices decide: one stored number, expanded, stands for each tensor.
        q = torch.zeros((), **place).expand(options.batch, options.heads, options.length, options.head_dim)
        table = None
        if not options.no_position:
            buckets = options.position_buckets
            rows = 2 * (buckets if buckets > 0 else options.max_relative_positions)
            table = torch.zeros((), **place).expand(options.heads, rows, options.head_dim)
        shape = {"none": None, "key": (options.batch, options.length)}.get(
            options.mask, (options.batch, 1, options.length, options.length)
        )
        mask = None if shape is None else torch.ones((), dtype=torch.bool, device=place["device"]).expand(shape)
        answer = dk.explain(
            q, q, q, table, table,
            attention_mask=mask,
            position_buckets=options.position_buckets,
            max_relative_positions=options.max_relative_positions,
            dropout_p=options.dropout,
            backend=options.backend,
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:  # torch asserts when a device is not there
        print(f"deberta-kernels explain: {error}", file=sys.stderr)
        return 1
    print(answer)
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Measure a model if one is named; else run the checkout's benchmark, or the small one that is installed."""
    from .bench import options

    if options.name_a_model(arguments):
        from .bench.command import run as run_model

        return run_model(options.parser().parse_args(arguments))
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "benchmarks" / "__main__.py").is_file():
        command = [sys.executable, "-m", "benchmarks", "core", *arguments]
        return subprocess.run(command, check=False, env=env.importing_from(str(checkout))).returncode
    from .demo.bench import run

    return run(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["bench"]:
        return bench(given[1:])
    options = parser().parse_args(given)
    if options.command == "info":
        return show_info()
    if options.command == "explain":
        return show_explanation(options)
    from .demo.runner import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
