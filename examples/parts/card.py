"""The model card: what the model is, what it was trained on and how well, how fast it ran here."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import deberta_kernels as dk
from deberta_kernels.native import processor

from .speed import table
from .task import Data, Task

__all__ = ["card", "versions"]

KEPT = (
    "epochs", "steps", "batch_size", "accumulation", "learning_rate", "schedule", "warmup", "weight_decay", "clip",
    "length", "precision", "seed",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions a run depends on."""
    found = {"deberta_kernels": dk.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**found, "Python": platform.python_version()}


def _processor(device: str) -> str:
    cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else processor.everyday_name()


def _front_matter(task: Task, options: argparse.Namespace) -> str:
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task.pipeline}"]
    if options.model and not Path(options.model).exists():
        lines.append(f"base_model: {options.model}")
    return "\n".join([*lines, "tags:", "- deberta", "---"])


def card(
    task: Task,
    options: argparse.Namespace,
    data: Data,
    metrics: dict[str, float],
    step: int,
    speed: dict[str, Any] | None,
) -> str:
    """Return README.md for a saved model."""
    held_out = options.validation.name if options.validation else "a part of it that was held out"
    source = options.data.name if options.data else "text that comes with deberta_kernels"
    rows = [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
    parts = [
        _front_matter(task, options),
        f"# {task.title}",
        f"Fine-tuned from {Path(options.model).name if options.model else 'random weights'} on {source} "
        f"({len(data.training)} records), evaluated on {held_out} ({len(data.validation)} records). "
        f"The weights are those of step {step}, the best by {options.metric}.",
        "\n".join(["| metric | value |", "|---|---:|", *rows]),
    ]
    if data.labels:
        parts.append("Labels: " + ", ".join(data.labels[:50]) + (" ..." if len(data.labels) > 50 else "") + ".")
    if speed:
        parts += [
            "## Speed",
            f"Measured at the end of this run on {speed['batches']} of its own batches ({speed['tokens']:,} tokens, "
            f"{options.precision}), in turns on the model patched by `deberta_kernels.patch` and on the stock model: "
            f"{_processor(options.device)}, {speed['threads']} thread(s).",
            table(speed),
        ]
    chosen = {name: getattr(options, name) for name in KEPT if getattr(options, name) is not None}
    if options.steps:
        chosen.pop("epochs")
    parts += [
        "## How it was trained",
        ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen.items()) + ".",
        ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"
