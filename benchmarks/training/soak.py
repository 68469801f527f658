"""Train a small patched model on batches of random size, and report how the resident memory grows per step.

python -m benchmarks soak                10,000 steps, some minutes
python -m benchmarks soak --steps 2000   fewer
python -m benchmarks soak --no-onednn    without PyTorch's oneDNN
python -m benchmarks soak --stock        the model as transformers makes it

PyTorch and oneDNN keep compiled code for every size they meet, in the stock model as well, until caches of 1024 entries
are full. That takes thousands of steps. `--no-onednn` shows what grows without them.
"""

from __future__ import annotations

import torch

import deberta_kernels as dk
from benchmarks.harness import record
from benchmarks.harness.process import note
from benchmarks.harness.record import Progress, Run
from deberta_kernels.testing import geometries, memory

__all__ = ["growth"]

MUST = 1.0  # KiB a step
WARM_UP = 0.2  # share of the steps in which allocators and caches fill
EVERY = 10  # steps between two readings
LEAST = 25
LONGEST, LARGEST_BATCH = 160, 4
NOTES, NOTED_FROM = 20, 1500  # a note after every twentieth; fewer steps take seconds
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": 512}
SIZES["position_buckets"] = 256


def growth(steps: int, stock: bool = False, seed: int = 0) -> float:
    """Return the slope of the resident memory over training steps, by least squares, in KiB a step."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    torch.manual_seed(seed)
    config = DebertaV2Config(**geometries.settings("tiny", vocab_size=256, **SIZES))
    model = DebertaV2ForSequenceClassification(config).train()
    if not stock:
        dk.patch(model, strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    readings: list[tuple[int, float]] = []
    progress = Progress([1.0] * NOTES)
    for step in range(steps):
        batch, length = (int(torch.randint(1, most + 1, ())) for most in (LARGEST_BATCH, LONGEST))
        ids = torch.randint(1, 256, (batch, length))
        mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
        mask[0] = 1
        model(input_ids=ids, attention_mask=mask, labels=torch.randint(2, (batch,))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // NOTES) == 0:
            left = progress.step()
            if steps > NOTED_FROM:
                note(f"step {step + 1} of {steps}, {left} left")
        if step >= WARM_UP * steps and step % EVERY == 0:
            readings.append((step, memory.status("VmRSS") / 1024))
    at, size = (torch.tensor(values, dtype=torch.float64) for values in zip(*readings))
    return float(((at - at.mean()) * (size - size.mean())).sum() / (at - at.mean()).square().sum())


def main(arguments: list[str] | None = None) -> int:
    """Run; return 1 when memory grows."""
    parser = record.options("soak", __doc__, strict=False, backend=False)
    parser.add_argument("--steps", type=int, default=0, help="default 10,000, with --quick 1,000")
    parser.add_argument("--no-onednn", action="store_true", help="switch PyTorch's oneDNN off")
    parser.add_argument("--stock", action="store_true", help="do not patch the model")
    options = parser.parse_args(arguments)
    steps = options.steps or (1000 if options.quick else 10_000)
    if steps < LEAST:
        parser.error(f"--steps must be at least {LEAST}, two readings after the warm-up, got {steps}")
    run = Run("soak", options, steps=steps, stock=options.stock, onednn=not options.no_onednn)
    if options.no_onednn:
        torch.backends.mkldnn.set_flags(False)
    slope = growth(steps, options.stock)
    run.keep(growth_kib_a_step=slope, must=MUST)
    what = f"{'stock' if options.stock else 'patched'}{', without oneDNN' if options.no_onednn else ''}"
    print(f"resident memory, {what}: {slope:+.3f} KiB a step over {steps} steps (at most {MUST})")
    return int(slope > MUST)
