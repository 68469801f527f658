"""How far two models' answers are apart: the largest difference over real tokens, and labels that changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deberta_kernels.demo.measure import Case

__all__ = ["Agreement", "Answers", "answers_of"]

SPANS = ("start_logits", "end_logits")


@dataclass(frozen=True)
class Answers:
    """What a model says of a batch.

    Attributes:
        numbers: name of an output -> its values of real tokens, or of whole texts.
        labels: one integer for each label, in a row; None where the head has none, or gives one number.
    """

    numbers: dict[str, torch.Tensor]
    labels: torch.Tensor | None


@dataclass
class Agreement:
    """The comparison with another model, over all batches so far.

    Attributes:
        difference: the largest one of any output.
        scale: the largest |output| of the other model.
        changed: labels that differ; None where the head has none.
        labels: how many labels there are.
    """

    difference: float = 0.0
    scale: float = 0.0
    changed: int | None = None
    labels: int = 0

    def add(self, expected: Answers, got: Answers) -> None:
        """Compare one more batch."""
        for name, wanted in expected.numbers.items():
            apart = (wanted.float() - got.numbers[name].float()).abs().max().item()
            self.difference = max(self.difference, apart) if apart == apart else float("nan")
            self.scale = max(self.scale, wanted.abs().max().item())
        if expected.labels is not None and got.labels is not None:
            self.changed = (self.changed or 0) + int((expected.labels != got.labels).sum())
            self.labels += expected.labels.numel()


def answers_of(output: Any, case: Case, several_labels: bool) -> Answers:
    """Take what counts out of a model's output.

    Args:
        output: what a model of transformers returned.
        case: its batch.
        several_labels: a text may have several labels, each of which counts where its logit is positive.
    """
    real = case.attention_mask.bool()
    found = {name: x for name, x in output.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    numbers = {name: x[real] if _is_of_tokens(name, x, real) else x for name, x in found.items()}
    spans = [found[name].float().masked_fill(~real, -torch.inf).argmax(-1) for name in SPANS if name in found]
    if spans:
        return Answers(numbers, torch.cat(spans))
    logits = numbers.get("logits")
    if logits is None or logits.shape[-1] < 2:
        return Answers(numbers, None)
    return Answers(numbers, (logits > 0).long().flatten() if several_labels else logits.argmax(-1))


def _is_of_tokens(name: str, x: torch.Tensor, real: torch.Tensor) -> bool:
    return real.dim() == 2 and (name in SPANS or x.dim() == 3) and x.shape[:2] == real.shape
