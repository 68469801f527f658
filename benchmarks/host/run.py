"""Measure what a patched model does beside its kernels: Python frames of a layer, host time of forwards and calls.

python -m benchmarks host             a minute
python -m benchmarks host --top 10    also names the functions entered most often

To compare two checkouts, run it in each of them in turns: cd CHECKOUT && python -m benchmarks host
"""

from __future__ import annotations

import torch

from benchmarks.harness import record
from benchmarks.harness.record import Progress, Run
from benchmarks.harness.tables import aligned
from benchmarks.host import call, frames, gpu

QUICK = 10  # times that each thing is measured


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = record.options("host", __doc__, strict=False, backend=False)
    parser.add_argument("--top", type=int, default=0, metavar="N", help="also name the N functions entered most often")
    options = parser.parse_args(arguments)
    run = Run("host", options)
    torch.manual_seed(0)
    repeats = {"repeats": QUICK} if run.quick else {}
    rows = [["a layer", "fast_linears", "frames of the package", "frames", "forward of 12 narrow layers, ms"]]
    layers = []
    cases = [(mode, fast_linears) for mode in frames.MODES for fast_linears in (False, "auto")]
    progress = Progress([1.0] * len(cases))
    for mode, fast_linears in cases:
        found = frames.frames(mode, fast_linears, options.top)
        spent = frames.forward_time(mode, fast_linears, **repeats)
        rows.append([mode, str(fast_linears), f"{found.package:.1f}", f"{found.total:.1f}", f"{spent * 1e3:.2f}"])
        rows += [[f"  {name}", "", f"{count:.1f}"] for name, count in found.top]
        layers.append({"mode": mode, "fast_linears": fast_linears, **found._asdict(), "forward_seconds": spent})
        progress.step(f"{mode}, fast_linears={fast_linears}: {found.package:.1f} frames of the package a layer")
    decision = frames.packing_decision_time(**repeats)
    calls = {name: measure(QUICK) if run.quick else measure() for name, measure in call.MEASURES.items()}
    functions = call.functions_entered()
    launching = {} if gpu.absence() else gpu.measure(QUICK) if run.quick else gpu.measure()
    run.keep(launching=launching, layers=layers, packing_decision_seconds=decision, calls=calls, functions=functions)
    print(aligned(rows, left=(0, 1), heads=1))
    print(f"\ndeciding whether to pack, 12 layers: {decision * 1e3:.3f} ms")
    print(f"\none call beside a native one that does nothing, (B, H, N, D) = {call.SIZES}:")
    print(aligned([[f"  {name}", f"{seconds * 1e6:.1f} µs"] for name, seconds in calls.items()], left=(0,)))
    print("\n".join([f"\nrun_attention enters {len(functions)} functions:", *(f"  {name}" for name in functions)]))
    print(f"\none layer's attention on a GPU, up to the driver, v3-base, {gpu.LENGTH} tokens: {gpu.absence() or ''}")
    rows = [["", *next(iter(launching.values()), {})]]
    for name, values in launching.items():
        cells = [f"{x:.0f}" if "launches" in key else f"{x * 1e6:.0f} µs" for key, x in values.items()]
        rows.append([f"  {name}", *cells])
    print(aligned(rows, left=(0,)))
    return 0
