"""Time the tile sizes of the Triton kernels on the GPU at hand and write their table, which the package then reads.

python -m benchmarks tune                                   every dtype, head size and direction; 20 minutes (estimated)
python -m benchmarks tune --dtypes bfloat16 --dims 64       the main ones; 4 minutes (estimated)
TRITON_INTERPRET=1 python -m benchmarks tune --device cpu   no GPU: tries this program itself, on tiny shapes

The candidates are those of `deberta_kernels.impl.triton.tuning`. A candidate must give the right answer before it is
timed, and replaces the pinned default only when it is faster by more than `MARGIN` over all shapes together. The table
is written again after every entry, and entries of an earlier run that are not measured again are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import names, numbers
from benchmarks.harness.process import ROOT, environment, note, now, program

DTYPES = ("bfloat16", "float16", "float32")
DIMS = (64, 32, 128, 256)
DIRECTIONS = ("forward", "backward")
# (batch, heads, length): short, middle and long, each enough to fill a GPU.
SHAPES = ((128, 12, 128), (32, 12, 512), (8, 12, 2048))
TINY_SHAPES = ((1, 1, 40),)
MARGIN = 0.02
MOST_PROCESSES = 16


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtypes", default="", type=names(DTYPES), help=f"comma-separated: {', '.join(DTYPES)}")
    parser.add_argument(
        "--dims", default="", type=numbers, help=f"comma-separated head sizes; {', '.join(map(str, DIMS))}"
    )
    parser.add_argument(
        "--directions", default="", type=names(DIRECTIONS), help=f"comma-separated: {', '.join(DIRECTIONS)}"
    )
    parser.add_argument("--seconds", type=float, default=0.0, help="start no entry after this many seconds")
    parser.add_argument("--output", default="", help="write here, not into the package")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def entries(options: argparse.Namespace) -> list[tuple[str, int, str]]:
    """Return (dtype, head size, direction) of every entry wanted, the most used first."""
    small = options.device == "cpu"
    dtypes = options.dtypes or (("float16",) if small else DTYPES)
    dims = options.dims or ((16,) if small else DIMS)
    directions = options.directions or DIRECTIONS
    return [(dtype, dim, direction) for dim in dims for dtype in dtypes for direction in directions]


def problem(device: str, dtype: str, dim: int, shape: tuple[int, int, int]) -> Any:
    """Draw an attention problem of a shape."""
    import torch

    from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

    batch, heads, length = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).to(getattr(torch, dtype))

    q, k, v = (normal(batch, length, heads, dim).transpose(1, 2) for _ in range(3))
    pos_key, pos_query = (normal(512, heads, dim).transpose(0, 1) for _ in range(2))
    scale = (3 * dim) ** -0.5
    return AttentionProblem(q, k, v, pos_key, pos_query, Masks(), PositionSpec(), scale, max_seqlen=length)


def planned(call: Any, direction: str, key: str, config: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the launches of one candidate and what they fill, by name."""
    import torch

    from deberta_kernels.impl.triton import launch

    forward = launch.forward_launches(call, key, config if direction == "forward" else None)
    out, lse = forward.results
    if direction == "forward":
        return forward.launches, {"out": out, "lse": lse}
    for step in forward.launches:
        launch.run(step)
    dout = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device).to(out.dtype)
    backward = launch.backward_launches(call, dout, None, out, lse, (True,) * 5, key, config)
    names = ("dq", "dk", "dv", "dpos_key", "dpos_query")
    return backward.launches, {**dict(zip(names, backward.results, strict=True)), "dout": dout}


def run_all(launches: list[Any]) -> None:
    """Run launches in order."""
    from deberta_kernels.impl.triton import launch

    for step in launches:
        launch.run(step)


def fault(options: argparse.Namespace, entry: tuple[str, int, str], key: str, config: Any) -> str:
    """Return what is wrong with the answer of a candidate on a problem with all zones and odd sizes, or ""."""
    from deberta_kernels.testing import budget

    dtype, dim, direction = entry
    call = problem(options.device, dtype, dim, (1, 1, 40) if options.device == "cpu" else (1, 2, 1250))
    launches, results = planned(call, direction, key, config)
    run_all(launches)
    truth = budget.truth(call, results.get("dout"))
    for name in truth.oracle.keys() - results.keys():
        del truth.oracle[name]
    report = budget.measure(results, truth, str(config))
    return "" if report.ok else str(report)


def measure(options: argparse.Namespace, entry: tuple[str, int, str], key: str) -> dict[str, Any]:
    """Time the candidates of one entry; return its line of the table, with everything that was measured."""
    import torch

    from benchmarks.gpu.device import Clock
    from benchmarks.harness.clock import Pace, interleave
    from deberta_kernels.impl.triton import tuning

    dtype, dim, direction = entry
    small = options.device == "cpu"
    candidates = tuning.candidates(key, getattr(torch, dtype), dim, direction)
    first, refused, failed, times = candidates[0], {}, {}, {}
    for config in candidates[:3] if small else candidates:
        try:
            wrong = fault(options, entry, key, config)
        except Exception as error:  # another candidate remains
            wrong = f"{type(error).__name__}: {str(error)[:300]}"
            if type(error).__name__ == "OutOfResources":  # of Triton: tiles larger than this device's memory
                refused[_text(config)] = wrong
                continue
        if wrong:
            failed[_text(config)] = wrong
        else:
            times[config] = []
    if not times:
        return {"dtype": dtype, "head_dim": dim, "direction": direction, "refused": refused, "failed": failed}
    for shape in TINY_SHAPES if small else SHAPES:
        call = problem(options.device, dtype, dim, shape)
        calls = {config: _caller(planned(call, direction, key, config)[0]) for config in times}
        pace = Pace(rounds=3, least=1, seconds=0.1, block=0.001) if small else Pace(15, 5, 0.15 * len(calls), 0.004)
        for config, sample in interleave(calls, pace, Clock(options.device).block).items():
            times[config].append(sample.median)
    best = fastest(times, first)
    return {
        "dtype": dtype,
        "head_dim": dim,
        "direction": direction,
        "tile": best.tile,
        "num_warps": best.num_warps,
        "num_stages": best.num_stages,
        "groups": best.groups,
        "milliseconds": {_text(config): [round(t * 1e3, 5) for t in found] for config, found in times.items()},
        "refused": refused,
        "failed": failed,
    }


def fastest(times: dict[Any, list[float]], first: Any) -> Any:
    """Return the candidate with the least time over all shapes together, or the default when it is about as fast."""
    mean = {config: math.exp(sum(map(math.log, found)) / len(found)) for config, found in times.items()}
    best = min(mean, key=lambda config: mean[config])
    return first if first in mean and mean[first] <= (1 + MARGIN) * mean[best] else best


def _caller(launches: list[Any]) -> Callable[[int], object]:
    return lambda _: run_all(launches)


def _text(config: Any) -> str:
    groups = f", {config.groups} groups" if config.groups > 1 else ""
    return f"tile {config.tile}, {config.num_warps} warps, {config.num_stages} stages{groups}"


def compile_share(options: argparse.Namespace, key: str) -> int:
    """Compile every n-th candidate, in one of many processes, so that they lie in Triton's cache; errors come later."""
    import torch

    from deberta_kernels.impl.triton import tuning

    index, count = (int(part) for part in options.share.split("/"))
    units = [
        (entry, config)
        for entry in entries(options)
        for config in tuning.candidates(key, getattr(torch, entry[0]), entry[1], entry[2])
    ]
    for entry, config in units[index::count]:
        try:
            run_all(planned(problem(options.device, entry[0], entry[1], (1, 1, 200)), entry[2], key, config)[0])
        except Exception as error:
            print(f"{entry} {_text(config)}: {type(error).__name__}", file=sys.stderr)
    return 0


def precompile(options: argparse.Namespace) -> None:
    """Compile in as many processes as there are cores."""
    count = max(1, min(MOST_PROCESSES, os.cpu_count() or 1))
    command = program("tune", "--device", options.device, "--dtypes", ",".join(options.dtypes))
    command += ["--dims", ",".join(map(str, options.dims)), "--directions", ",".join(options.directions), "--share"]
    running = [
        subprocess.Popen([*command, f"{i}/{count}"], stdout=subprocess.DEVNULL, env=environment()) for i in range(count)
    ]
    for process in running:
        process.wait()


def store(path: Path, entry: dict[str, Any], about: dict[str, Any]) -> None:
    """Put one entry into the table, in place of the one it replaces; one entry a line."""
    known = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else []
    names = ("dtype", "head_dim", "direction")
    kept = [old for old in known if any(old[name] != entry[name] for name in names)]
    rows = sorted([*kept, entry], key=lambda row: tuple(row[name] for name in names))
    head = json.dumps(about, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "entries": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 when a candidate fails or an entry has none that works, 2 without a device."""
    options = parse(arguments)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "python -m benchmarks tune: torch sees no GPU; TRITON_INTERPRET=1 with --device cpu tries the program",
            file=sys.stderr,
        )
        return 2
    from benchmarks.gpu.device import describe
    from benchmarks.harness import machine
    from benchmarks.harness.record import Progress
    from deberta_kernels.impl.triton import tuning

    key = tuning.device_key(torch.device(options.device))
    if options.share:
        return compile_share(options, key)
    small = options.device == "cpu"
    path = Path(options.output) if options.output else tuning.CONFIGS / f"{key}.json"
    if small and not options.output:
        path = ROOT / "build" / "gpu" / f"{key}.json"
    started = time.monotonic()
    if not small:
        note("compiling all candidates")
        precompile(options)
    about = {
        "date": now(),
        "commit": machine.commit(),
        "device": describe(options.device),
        "shapes": TINY_SHAPES if small else SHAPES,
    }
    wrong, left_out, wanted = [], [], entries(options)
    progress = Progress(1.0 for _ in wanted)
    for entry in wanted:
        if options.seconds and time.monotonic() - started > options.seconds:
            left_out.append(entry)
            continue
        found = measure(options, entry, key)
        wrong += [f"{entry}: {name}: {why}" for name, why in found["failed"].items()]
        if "tile" not in found:
            progress.step(f"{entry}: no candidate works: {found['refused']} {found['failed']}")
            wrong.append(f"{entry}: no candidate works")
            continue
        store(path, found, about)
        times = ", ".join(f"{name}: {x}" for name, x in found["milliseconds"].items())
        best = f"tile {found['tile']}, {found['num_warps']} warps, {found['num_stages']} stages"
        progress.step(f"{entry}: {best} of {times} ms")
    for text in [*(f"no time left for {entry}" for entry in left_out), *(f"FAILED {text}" for text in wrong)]:
        print(text)
    print(f"written: {path}")
    return int(bool(wrong))
