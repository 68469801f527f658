"""Memory of training each released size, eager and patched: the tables of docs/training.md.

What one layer keeps for backward is measured on a real layer of each geometry, by hooks on saved tensors; a model keeps
that times its layers. The measured column is the high-water mark of a whole step in a process of its own. Measurements
are kept under build/, so that an interrupted run goes on where it was; delete the file after a change of the kernels.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import deberta_kernels as dk
from benchmarks.harness.process import ROOT, run_alone
from benchmarks.harness.record import Progress
from benchmarks.harness.tables import markdown_rows, replace_section
from deberta_kernels.testing import geometries
from deberta_kernels.testing.memory import free, peak

__all__ = ["one_layer", "step", "write_table"]

DOCUMENT = ROOT / "docs" / "training.md"
KEPT = ROOT / "build" / "benchmarks" / "training-memory.json"
LENGTHS = (512, 2048)
GIGABYTE, MEBIBYTE = 1e9, 2**20
BYTES_PER_WEIGHT = 16  # float32: the weight, its gradient and AdamW's two moments
MODELS = ("v3-base", "v3-large", "v2-xlarge", "v2-xxlarge")
# Saved for backward by one attention module of v3-base: what it may be of eager's, at each length.
MUST, AIM = {512: 0.25, 2048: 0.10}, {512: 0.15, 2048: 0.05}


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
    config = DebertaV2Config(**geometries.settings(name, num_hidden_layers=1, vocab_size=64))
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
        return sum(p.numel() for p in DebertaV2Model(DebertaV2Config(**geometries.settings(name))).parameters())


def computed(name: str, length: int, patched: bool, checkpointing: bool, layer: int) -> float:
    """Return the bytes of weights, gradients, optimizer and what is kept for backward, one sequence at a time."""
    config = geometries.settings(name)
    layers, states = config["num_hidden_layers"], length * config["hidden_size"] * 4
    kept = layers * states + layer if checkpointing else layers * layer
    return parameters(name) * BYTES_PER_WEIGHT + kept


def measured(name: str, length: int, patched: bool, checkpointing: bool, expected: float, threads: int) -> float | None:
    """Return the high-water mark of a step, in bytes; None where it does not fit, or with 0 threads."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    key = f"{name} {length} {patched} {checkpointing}" + (f" {threads} threads" if threads > 1 else "")
    if key in kept:
        return float(kept[key])
    if not threads or expected * 1.15 + 2e9 > free():
        return None
    found = run_alone(step, threads, name=name, length=length, patched=patched, checkpointing=checkpointing)
    if "error" in found:
        print(f"{name} {length}: {found['error']}", file=sys.stderr)
        return None
    kept[key] = found["bytes"] + found["held_before"]
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return float(kept[key])


def step(name: str, length: int, patched: bool, checkpointing: bool) -> dict[str, Any]:
    """Train one model for two steps and return the peak of the second."""
    from transformers import DebertaV2Config, DebertaV2Model

    model = DebertaV2Model(DebertaV2Config(**geometries.settings(name))).train()
    if patched:
        dk.patch(model, strict=True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)

    def run(tokens: int) -> list[Any]:
        ids = torch.randint(1, 1000, (1, tokens))
        model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return []

    run(32)
    return peak(lambda: run(length))


def tables(threads: int) -> tuple[list[list[str]], list[list[str]]]:
    """Return what one module keeps, and what training takes, each with a head; 0 threads measure nothing anew."""
    kept = [["N", "eager, MiB", "patched, MiB", "share", "must", "aim"]]
    for length in LENGTHS:
        eager, ours = (one_layer("v3-base", length, patched, "attention") for patched in (False, True))
        bounds = [f"≤ {MUST[length]:.0%}", f"≤ {AIM[length]:.0%}"]
        kept.append([str(length), f"{eager / MEBIBYTE:.0f}", f"{ours / MEBIBYTE:.1f}", f"{ours / eager:.1%}", *bounds])
    ways = [(patched, checkpointing) for patched in (False, True) for checkpointing in (False, True)]
    head = [f"{'patched' if x else 'eager'}, {'checkpointing' if y else 'plain'}" for x, y in ways]
    whole = [["model", "N", *head]]
    cells = [(name, length) for name in MODELS for length in LENGTHS]
    progress = Progress(geometries.settings(name)["num_hidden_layers"] * length for name, length in cells)
    for name, length in cells:
        layers = {patched: one_layer(name, length, patched, "layer") for patched in (False, True)}
        row = [name, str(length)]
        for patched, checkpointing in ways:
            expected = computed(name, length, patched, checkpointing, layers[patched])
            found = measured(name, length, patched, checkpointing, expected, threads)
            row.append(f"{expected / GIGABYTE:.1f} / {'-' if found is None else f'{found / GIGABYTE:.1f}'}")
        progress.step(", ".join(row))
        whole.append(row)
    return kept, whole


def write_table(threads: int) -> None:
    """Measure what fits, with this many threads, and print the tables; 0 compute only.

    Those of one thread are those of docs/training.md, and written there.
    """
    kept, whole = tables(threads)
    lines = ["", "Saved for backward by one attention module of v3-base, float32, one sequence, dropout 0.1:", ""]
    lines += markdown_rows(kept, text=0)
    lines += ["", "Training one sequence in float32 with AdamW, GB; computed / measured (-: not measured here):", ""]
    lines += [*markdown_rows(whole), ""]
    if threads <= 1:
        replace_section(DOCUMENT, "training-memory", lines)
    print("\n".join(lines))
