"""Train a small patched model on batches of random size, and report how the resident memory grows per step.

python -m benchmarks soak                10,000 steps, some minutes
python -m benchmarks soak --steps 2000   fewer
python -m benchmarks soak --no-onednn    without PyTorch's oneDNN
python -m benchmarks soak --stock        the model as transformers makes it

PyTorch and oneDNN keep compiled code for every size they meet, in the stock model as well, until caches of 1024 entries
are full. That takes thousands of steps. `--no-onednn` shows what grows without them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import deberta_kernels as dk

__all__ = ["growth"]

MUST = 1.0  # KiB a step
WARM_UP = 0.2  # share of the steps in which allocators and caches fill
EVERY = 10  # steps between two readings
LONGEST, LARGEST_BATCH = 160, 4


def growth(steps: int, stock: bool = False, seed: int = 0) -> float:
    """Return the slope of the resident memory over training steps, by least squares, in KiB a step."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    torch.manual_seed(seed)
    config = DebertaV2Config(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=512, relative_attention=True, position_buckets=256, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0,
    )  # fmt: skip
    model = DebertaV2ForSequenceClassification(config).train()
    if not stock:
        dk.patch(model, strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    readings: list[tuple[int, float]] = []
    for step in range(steps):
        batch, length = (int(torch.randint(1, most + 1, ())) for most in (LARGEST_BATCH, LONGEST))
        ids = torch.randint(1, 256, (batch, length))
        mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
        mask[0] = 1
        model(input_ids=ids, attention_mask=mask, labels=torch.randint(2, (batch,))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= WARM_UP * steps and step % EVERY == 0:
            readings.append((step, _resident()))
    at, size = (torch.tensor(values, dtype=torch.float64) for values in zip(*readings))
    return float(((at - at.mean()) * (size - size.mean())).sum() / (at - at.mean()).square().sum())


def _resident() -> float:
    """Return the resident memory of this process, in KiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return float(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmRSS; memory is measured on Linux only")


def main(arguments: list[str] | None = None) -> int:
    """Run; return 1 when memory grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--no-onednn", action="store_true", help="switch PyTorch's oneDNN off")
    parser.add_argument("--stock", action="store_true", help="do not patch the model")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.no_onednn:
        torch.backends.mkldnn.set_flags(False)
    slope = growth(options.steps, options.stock)
    what = f"{'stock' if options.stock else 'patched'}{', without oneDNN' if options.no_onednn else ''}"
    print(f"resident memory, {what}: {slope:+.3f} KiB a step over {options.steps} steps (at most {MUST})")
    return int(slope > MUST)
