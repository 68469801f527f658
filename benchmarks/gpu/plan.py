"""The settings of one run: the device, the shapes and how long each part may take."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from benchmarks.registry import GPU_LENGTHS, Shape

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """The settings that every stage shares.

    Attributes:
        device: "cuda" or "cpu"; on the CPU everything runs on small shapes, to prove the harness and nothing else.
        backend: which backend is ours.
        smoke: the 90-second form.
        tokens: batch times length of every timed shape.
        lengths: tokens of one sequence, for the timed shapes.
        dtype: of the timed shapes.
        seconds: time after which no further candidate of one shape is timed.
        candidates: candidates to use, or () for all.
    """

    device: str = "cuda"
    backend: str = "triton"
    smoke: bool = False
    tokens: int = 16384
    lengths: tuple[int, ...] = GPU_LENGTHS
    dtype: str = "bfloat16"
    seconds: float = 1.0
    candidates: tuple[str, ...] = ()

    @property
    def small(self) -> bool:
        """Return whether only the harness is tried."""
        return self.device == "cpu"

    def shapes(self) -> list[Shape]:
        """Return the timed shapes: forward, then forward and backward, and of each the lengths of the figures first."""
        first = [n for n in (512, 2048, 8192) if n in self.lengths]
        lengths = [*first, *(n for n in self.lengths if n not in first)]
        return [Shape(max(1, self.tokens // n), n, self.dtype, backward) for backward in (False, True) for n in lengths]

    def as_text(self) -> str:
        """Return the settings as JSON, for another process."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> Plan:
        """Return the settings that `as_text` wrote."""
        values = json.loads(text)
        return Plan(**{**values, "lengths": tuple(values["lengths"]), "candidates": tuple(values["candidates"])})
