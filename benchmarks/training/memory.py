"""Memory of training each released size, eager and patched: the tables of docs/training.md.

What one more layer keeps for backward is measured on encoders of each geometry, by hooks on saved tensors; a model
keeps that times its layers. The measured column is the high-water mark of a whole step in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch

import deberta_kernels as dk
from benchmarks.harness.process import note, run_alone
from benchmarks.harness.record import Progress, Run
from benchmarks.harness.tables import markdown_rows, sentence
from deberta_kernels.testing import geometries
from deberta_kernels.testing.memory import free, peak

__all__ = ["measure_training", "one_attention", "one_layer", "section", "step"]

LENGTHS = (512, 2048)
GIGABYTE, MEBIBYTE = 1e9, 2**20
BYTES_PER_WEIGHT = 16  # float32: the weight, its gradient and AdamW's two moments
WAYS = ("eager", "patched")
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


def one_attention(name: str, length: int, patched: bool) -> int:
    """Return the bytes that one attention module keeps for backward of one sequence."""
    encoder, states, mask = _encoder(name, length, patched, 1)
    arguments: dict[str, Any] = {"rel_embeddings": encoder.get_rel_embedding()}
    if patched:
        arguments |= {"attention_mask": mask[:, None, None, :]}
    else:
        arguments |= {"attention_mask": encoder.get_attention_mask(mask), "relative_pos": encoder.get_rel_pos(states)}
    attention = encoder.layer[0].attention.self
    return saved_bytes(lambda: attention(states, **arguments), [*encoder.parameters(), *encoder.buffers()])


def one_layer(name: str, length: int, patched: bool) -> int:
    """Return the bytes that one more layer of an encoder keeps for backward of one sequence.

    Not what a layer keeps that is called alone: there a patched one hands out a copy of what its attention keeps.
    """

    def kept(layers: int) -> int:
        encoder, states, mask = _encoder(name, length, patched, layers)
        known = [*encoder.parameters(), *encoder.buffers()]
        return saved_bytes(lambda: encoder(states, mask, output_hidden_states=False), known)

    return kept(2) - kept(1)


def _encoder(name: str, length: int, patched: bool, layers: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return an encoder in training, states for it and a mask that keeps all of them."""
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    config = DebertaV2Config(**geometries.settings(name, num_hidden_layers=layers, vocab_size=64))
    encoder = DebertaV2Model(config).train().encoder
    if patched:
        dk.patch(encoder, strict=True)
    return encoder, torch.randn(1, length, config.hidden_size, requires_grad=True), torch.ones(1, length)


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
    """Return the high-water mark of a step, in bytes; None where it does not fit."""
    if expected * 1.15 + 2e9 > free():
        return None
    found = run_alone(step, threads, name=name, length=length, patched=patched, checkpointing=checkpointing)
    if "error" in found:
        note(f"{name} {length}: {found['error']}")
        return None
    return float(found["bytes"] + found["held_before"])


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


def measure_training(run: Run) -> None:
    """Measure what one module keeps, and what training takes where it fits; keep both in the result.

    "attention" holds {length, eager, patched}, bytes; "training" {model, length, patched, checkpointing, computed,
    measured}, bytes, measured None where it does not fit on this machine.
    """
    kept = [
        {"length": length, **{name: one_attention("v3-base", length, name == "patched") for name in WAYS}}
        for length in LENGTHS
    ]
    cells = [(name, length) for name in MODELS[: 1 if run.quick else None] for length in LENGTHS]
    progress = Progress(geometries.settings(name)["num_hidden_layers"] * length for name, length in cells)
    found: list[dict[str, Any]] = []
    run.keep(complete=False, attention=kept, training=found)
    for name, length in cells:
        for patched in (False, True):
            layer = one_layer(name, length, patched)
            for checkpointing in (False, True):
                way = {"model": name, "length": length, "patched": patched, "checkpointing": checkpointing}
                expected = computed(name, length, patched, checkpointing, layer)
                peak = measured(name, length, patched, checkpointing, expected, run.threads)
                found.append({**way, "computed": expected, "measured": peak})
        progress.step(f"{name} {length}: " + ", ".join(map(_gigabytes, found[-4:])))
        run.keep()
    run.keep(complete=True)


def _gigabytes(record: dict[str, Any]) -> str:
    peak = record["measured"]
    return f"{record['computed'] / GIGABYTE:.1f} / {'-' if peak is None else f'{peak / GIGABYTE:.1f}'}"


def section(result: dict[str, Any]) -> str:
    """Return the tables of docs/training.md."""
    kept = [["N", "eager, MiB", "patched, MiB", "share", "must", "aim"]]
    for record in result["attention"]:
        length, eager, ours = record["length"], record["eager"], record["patched"]
        bounds = [f"≤ {MUST[length]:.0%}", f"≤ {AIM[length]:.0%}"]
        kept.append([str(length), f"{eager / MEBIBYTE:.0f}", f"{ours / MEBIBYTE:.1f}", f"{ours / eager:.1%}", *bounds])
    whole = [["model", "N", *(f"{name}, {way}" for name in WAYS for way in ("plain", "checkpointing"))]]
    cells: dict[tuple[str, int], list[str]] = {}
    for record in result["training"]:
        cells.setdefault((record["model"], record["length"]), []).append(_gigabytes(record))
    whole += [[model, str(length), *texts] for (model, length), texts in cells.items()]
    return "\n".join(
        [
            "Saved for backward by one attention module of v3-base, float32, one sequence, dropout 0.1:", "",
            *markdown_rows(kept, text=0), "",
            "Training one sequence in float32 with AdamW, GB; computed / measured (-: not measured here):", "",
            *markdown_rows(whole), "", sentence(result),
        ]
    )  # fmt: skip
