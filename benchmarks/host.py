"""Time what a patched model does beside its kernels: CPU time of a forward of 12 narrow layers, full and ragged.

To compare two checkouts, run it in each of them in turns: cd CHECKOUT && python -m benchmarks host
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import DebertaV2Config, DebertaV2Model

import deberta_kernels as dk
from deberta_kernels.testing.geometries import settings

_REPEATS = 40


def build() -> DebertaV2Model:
    config = DebertaV2Config(
        **settings("v3-base", vocab_size=128, hidden_size=64, num_attention_heads=4, intermediate_size=64)
    )
    return DebertaV2Model(config).eval()


@torch.no_grad()
def forward_time(model: DebertaV2Model, mask: torch.Tensor) -> float:
    """Return the least CPU time of a forward, in milliseconds."""
    ids, times = torch.full(mask.shape, 7), []
    for _ in range(_REPEATS):
        start = time.process_time()
        model(ids, attention_mask=mask)
        times.append(time.process_time() - start)
    return min(times) * 1e3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args(arguments).threads)
    model = build()
    dk.patch(model)
    full = torch.ones(4, 16, dtype=torch.long)
    ragged = full.clone()
    ragged[1:, 8:] = 0
    for name, mask in (("full", full), ("ragged", ragged)):
        forward_time(model, mask)
        print(f"{name} batch of 4 x 16: {forward_time(model, mask):.2f} ms")
    return 0
