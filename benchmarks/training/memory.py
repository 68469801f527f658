"""Write the table of docs/training.md: memory of training each released size, eager and patched.

python -m benchmarks memory               compute, measure what fits, write the table; 20 minutes
python -m benchmarks memory --no-measure  measure nothing that was not measured before, 2 minutes

What one layer keeps for backward is measured on a real layer of each geometry, by hooks on saved tensors; a model keeps
that times its layers. The measured column is the high-water mark of a whole step in a process of its own. Measurements
are kept under build/, so that an interrupted run goes on where it was; delete the file after a change of the kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from typing import Any

import torch

import deberta_kernels as dk
from benchmarks.harness.memory import peak
from benchmarks.harness.process import ROOT, run_alone
from benchmarks.model.memory import V2_XXLARGE, free_memory

DOCUMENT = ROOT / "docs" / "training.md"
KEPT = ROOT / "build" / "benchmarks" / "training-memory.json"
BEGIN, END = "<!-- training-memory:begin -->", "<!-- training-memory:end -->"
LENGTHS = (512, 2048)
GIGABYTE, MEBIBYTE = 1e9, 2**20
BYTES_PER_WEIGHT = 16  # float32: the weight, its gradient and AdamW's two moments
V2_XLARGE = {**V2_XXLARGE, "num_hidden_layers": 24}
MODELS: dict[str, dict[str, Any]] = {
    "v3-base": {"vocab_size": 128100},
    "v3-large": {
        "vocab_size": 128100, "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "v2-xlarge": V2_XLARGE,
    "v2-xxlarge": V2_XXLARGE,
}  # fmt: skip
# Saved for backward by one attention module of v3-base: what it may be of eager's, at each length.
MUST, AIM = {512: 0.25, 2048: 0.10}, {512: 0.15, 2048: 0.05}


def settings(name: str) -> dict[str, Any]:
    """Return the configuration of a model; dropout is transformers' default, 0.1."""
    from benchmarks.core.candidates import model_settings

    return {**model_settings(), "num_hidden_layers": 12, **MODELS[name]}


def saved_bytes(call: Any, known: list[torch.Tensor]) -> int:
    """Return the bytes of the distinct storages that a call saves for backward, those of `known` tensors left out."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()
    del kept
    return total


def one_layer(name: str, length: int, patched: bool, part: str) -> int:
    """Return the bytes that one "layer", or its "attention", keeps for backward of one sequence."""
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    config = DebertaV2Config(**{**settings(name), "num_hidden_layers": 1, "vocab_size": 64})
    encoder = DebertaV2Model(config).train().encoder
    if patched:
        dk.patch(encoder, strict=True)
    layer = encoder.layer[0]
    module = layer if part == "layer" else layer.attention.self
    states = torch.randn(1, length, config.hidden_size, requires_grad=True)
    mask = torch.ones(1, length)
    rel_embeddings = encoder.get_rel_embedding()
    if patched:
        arguments: dict[str, Any] = {"attention_mask": mask[:, None, None, :]}
    else:
        arguments = {"attention_mask": encoder.get_attention_mask(mask), "relative_pos": encoder.get_rel_pos(states)}
    known = [*encoder.parameters(), *encoder.buffers()]
    return saved_bytes(lambda: module(states, rel_embeddings=rel_embeddings, **arguments), known)


def parameters(name: str) -> int:
    """Return the number of weights, without allocating them."""
    from transformers import DebertaV2Config, DebertaV2Model

    with torch.device("meta"):
        return sum(p.numel() for p in DebertaV2Model(DebertaV2Config(**settings(name))).parameters())


def computed(name: str, length: int, patched: bool, checkpointing: bool, layer: int) -> float:
    """Return the bytes of weights, gradients, optimizer and what is kept for backward, one sequence at a time."""
    config = settings(name)
    layers, states = config["num_hidden_layers"], length * config["hidden_size"] * 4
    kept = layers * states + layer if checkpointing else layers * layer
    return parameters(name) * BYTES_PER_WEIGHT + kept


def measured(
    name: str, length: int, patched: bool, checkpointing: bool, expected: float, measure: bool
) -> float | None:
    """Return the high-water mark of a step, in bytes; None where it does not fit, or is not to be measured."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    key = f"{name} {length} {patched} {checkpointing}"
    if key in kept:
        return float(kept[key])
    if not measure or expected * 1.15 + 2e9 > free_memory():
        return None
    flags = [*(["--patched"] if patched else []), *(["--checkpointing"] if checkpointing else [])]
    found = run_alone("benchmarks.training.memory", ["--step", name, "--length", str(length), *flags])
    if "error" in found:
        print(f"{name} {length}: {found['error']}", file=sys.stderr)
        return None
    kept[key] = found["bytes"] + found["held_before"]
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return float(kept[key])


def step(options: argparse.Namespace) -> dict[str, Any]:
    """Train one model for two steps and return the peak of the second."""
    from transformers import DebertaV2Config, DebertaV2Model

    torch.set_num_threads(1)
    model = DebertaV2Model(DebertaV2Config(**settings(options.step))).train()
    if options.patched:
        dk.patch(model, strict=True)
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)

    def run(length: int) -> list[Any]:
        ids = torch.randint(1, 1000, (1, length))
        model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return []

    run(32)
    return peak(lambda: run(options.length))


def table(measure: bool) -> list[str]:
    """Return the lines of both tables."""
    lines = ["Saved for backward by one attention module of v3-base, float32, one sequence, dropout 0.1:", ""]
    lines += ["| N | eager, MiB | patched, MiB | share | must | aim |", "|---:|---:|---:|---:|---:|---:|"]
    for length in LENGTHS:
        eager, ours = (one_layer("v3-base", length, patched, "attention") for patched in (False, True))
        bounds = f"≤ {MUST[length]:.0%} | ≤ {AIM[length]:.0%}"
        lines.append(f"| {length} | {eager / MEBIBYTE:.0f} | {ours / MEBIBYTE:.1f} | {ours / eager:.1%} | {bounds} |")
    head = ["model", "N", *(f"{x}, {y}" for x in ("eager", "patched") for y in ("plain", "checkpointing"))]
    lines += ["", "Training one sequence in float32 with AdamW, GB; computed / measured (-: not measured here):", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name in MODELS:
        for length in LENGTHS:
            cells = []
            for patched in (False, True):
                layer = one_layer(name, length, patched, "layer")
                for checkpointing in (False, True):
                    expected = computed(name, length, patched, checkpointing, layer)
                    found = measured(name, length, patched, checkpointing, expected, measure)
                    cells.append(f"{expected / GIGABYTE:.1f} / {'-' if found is None else f'{found / GIGABYTE:.1f}'}")
                    print(name, length, patched, checkpointing, cells[-1], file=sys.stderr, flush=True)
            lines.append(f"| {name} | {length} | " + " | ".join(cells) + " |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Write the table, or measure one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-measure", action="store_true", help="compute only")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=512, help=argparse.SUPPRESS)
    parser.add_argument("--patched", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with suppress(RuntimeError):
        torch.set_num_interop_threads(1)
    if options.step:
        print(json.dumps(step(options)))
        return 0
    lines = table(not options.no_measure)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    DOCUMENT.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]), encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
