"""Command line: `python -m deberta_kernels demo | info | bench | explain | warmup`, or `deberta-kernels`.

Status 2 means wrong arguments, 1 that a command could not do its work. Nothing here imports torch before it is needed:
`info`, `--version` and `--help` work without it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deberta_kernels import __version__, env

from .demo import arguments, checkpoint, results

__all__ = ["main"]

PROGRAM = "deberta-kernels"
MASKS = ("none", "key", "pair")
DTYPES = ("float32", "bfloat16", "float16", "float64")  # those of `dtypes`, which would import torch for --help
LARGEST_TENSOR = 2**63 - 1  # numbers
INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


def parser() -> arguments.Parser:
    """Return the command line's parser."""
    top = arguments.Parser(prog=PROGRAM, description="Fused disentangled attention for DeBERTa.")
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="demo | info | bench | explain | warmup")
    demo = commands.add_parser("demo", help="measure a DeBERTa on real text before and after patching")
    arguments.add_demo_arguments(demo)
    info = commands.add_parser("info", help="say what is installed, which backends are active, and why: for a report")
    info.add_argument("--json", action="store_true", help="as JSON, with keys that stay")
    commands.add_parser(
        "bench",
        help="measure a model of yours on texts of yours (--model, --text); without --model, time the attention core",
        add_help=False,
    )
    explain = commands.add_parser("explain", help="say which backend would run a call, and why not the others")
    explain.add_argument("--batch", type=arguments.size, default=1, help="B")
    explain.add_argument("--heads", type=arguments.size, default=12, help="H")
    explain.add_argument("--length", type=arguments.size, default=512, help="N, queries and keys")
    explain.add_argument("--head-dim", type=arguments.size, default=64, help="D")
    explain.add_argument("--dtype", choices=DTYPES, default="float32")
    explain.add_argument("--device", default="cpu", help="a torch device, such as cpu or cuda:0")
    explain.add_argument("--mask", choices=MASKS, default="none", help="none, per key (B, N), per pair (B, 1, N, N)")
    explain.add_argument("--dropout", type=arguments.probability, default=0.0, help="probability in [0, 1)")
    explain.add_argument("--position-buckets", type=int, default=256)
    explain.add_argument("--max-relative-positions", type=arguments.size, default=512)
    explain.add_argument("--no-position", action="store_true", help="neither c2p nor p2c")
    explain.add_argument("--backend", choices=arguments.BACKEND_NAMES, default="auto")
    warmup = commands.add_parser("warmup", help="compile the GPU kernels ahead of the first call, for this GPU")
    warmup.add_argument("--training", action="store_true", help="those of training too")
    warmup.add_argument("--dtype", nargs="+", choices=DTYPES[:3], default=["bfloat16"], help="default: bfloat16")
    warmup.add_argument(
        "--head-dim", type=arguments.size, default=64, help="D (default: 64, as in all released models)"
    )
    warmup.add_argument("--mask", nargs="+", choices=MASKS, default=["none", "key"], help="default: none key")
    warmup.add_argument("--dropout", type=arguments.probability, default=0.1, help="in training (default: 0.1)")
    warmup.add_argument("--device", default="cuda", help="a torch device (default: cuda)")
    return top


def show_info(as_json: bool) -> int:
    """Print the state of the installation."""
    from .info import format_info, info

    print(json.dumps(info(), indent=1) if as_json else format_info())
    return 0


def show_explanation(options: argparse.Namespace) -> int:
    """Print which backend would run a call of the given shape."""
    if missing := arguments.missing_package("torch"):
        return _failed("explain", missing)
    scores = options.batch * options.heads * options.length * max(options.length, options.head_dim)
    if scores > LARGEST_TENSOR:
        sizes = f"--batch {options.batch} --heads {options.heads} --length {options.length}"
        return _failed("explain", f"{sizes}: a tensor has fewer than 2**63 numbers; name a smaller call", status=2)
    import torch

    import deberta_kernels as dk

    try:
        device = torch.device(options.device)
    except RuntimeError:
        remedy = "write cuda, or cuda:0 for the first GPU" if "gpu" in options.device.lower() else "write cpu or cuda"
        return _failed("explain", f"--device must be a device of torch, got {options.device!r}; {remedy}", status=2)
    place: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "device": device}
    try:
        torch.zeros((), **place)
    except Exception as error:  # torch asserts, or raises one of several errors, when a device is not there
        said = f"torch {torch.__version__} cannot use it ({_first_line(error)})"
        return _failed("explain", f"--device {device}: {said}; `{PROGRAM} info` lists GPUs")
    try:
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
        mask = None if shape is None else torch.ones((), dtype=torch.bool, device=device).expand(shape)
        answer = dk.explain(
            q, q, q, table, table,
            attention_mask=mask,
            position_buckets=options.position_buckets,
            max_relative_positions=options.max_relative_positions,
            dropout_p=options.dropout,
            backend=options.backend,
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError) as error:
        return _failed("explain", _first_line(error))
    print(answer)
    return 0


def warm_up(options: argparse.Namespace) -> int:
    """Compile the kernels of a GPU."""
    if missing := arguments.missing_package("torch"):
        return _failed("warmup", missing)
    import torch

    from . import warmup

    try:
        device = torch.device(options.device)
    except RuntimeError:
        return _failed("warmup", f"--device must be cuda or cuda:N, got {options.device!r}", status=2)
    if device.type != "cuda" or not torch.cuda.is_available():
        said = "torch sees no GPU" if device.type == "cuda" else f"kernels are compiled for GPUs, not for {device.type}"
        return _failed("warmup", f"{said}; run it on the machine that will compute (`{PROGRAM} info` lists GPUs)")
    dtypes = [getattr(torch, name) for name in options.dtype]
    wanted = warmup.kinds(dtypes, options.mask, training=options.training, dropout=options.dropout)
    complete = warmup.warm(wanted, options.head_dim, device, print)
    print(f"compiled kernels are in {warmup.folder()}" if complete else "not all of it runs in GPU kernels, see above")
    return int(not complete)


def bench(given: Sequence[str]) -> int:
    """Measure a model if one is named; else run the checkout's benchmark, or the small one that is installed."""
    from .bench import options

    wanted = options.parser().parse_args(given) if options.name_a_model(given) else None
    if missing := arguments.missing_package("torch"):
        return _failed("bench", missing)
    if wanted is not None:
        from .bench.command import run as run_model

        return run_model(wanted)
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "benchmarks" / "__main__.py").is_file():
        command = [sys.executable, "-m", "benchmarks", "core", *given]
        return subprocess.run(command, check=False, env=env.importing_from(str(checkout))).returncode
    from .bench.core import run

    return run(given)


def demo(options: argparse.Namespace) -> int:
    """Run the demo, unless something it needs is not there."""
    if missing := arguments.missing_package("torch", "transformers"):
        return _failed("demo", missing)
    try:
        results.check_folder(options.output, *(options.name + ending for ending in (".json", ".csv", ".png")))
        if options.model is not None:
            checkpoint.check_model(options.model)
    except (OSError, ValueError) as error:
        return _failed("demo", str(error))
    from .demo.runner import run

    return run(options)


def _failed(command: str, message: str, status: int = 1) -> int:
    print(f"{PROGRAM} {command}: {message}", file=sys.stderr)
    return status


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(". ")[0][:300]


def _run(given: list[str]) -> int:
    if given[:1] == ["bench"]:
        return bench(given[1:])
    options = parser().parse_args(given)
    if options.command == "info":
        return show_info(options.json)
    if options.command == "explain":
        return show_explanation(options)
    if options.command == "warmup":
        return warm_up(options)
    return demo(options)


def main(given: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit status."""
    words = list(sys.argv[1:] if given is None else given)
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read has seen enough; Python would complain again when it closes the pipe
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:  # a package that is there and broken
        return _failed(words[0], f"{error}; `{PROGRAM} info` shows what is installed")
    except OSError as error:  # a full disk, a folder that is gone
        return _failed(words[0], str(error))


if __name__ == "__main__":
    sys.exit(main())
