"""The devices that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHIPS", "Chip"]


@dataclass(frozen=True)
class Chip:
    """A device to compile for.

    Attributes:
        backend: "cuda" or "hip".
        architecture: compute capability times ten, or the name of the architecture.
        lanes: threads of a warp.
        shared: bytes of shared memory one program may have.
        matrix: the matrix instructions a kernel in a 16-bit dtype must use there.
    """

    backend: str
    architecture: int | str
    lanes: int
    shared: int
    matrix: tuple[str, ...]


# Shared memory: CUDA C++ programming guide, "technical specifications per compute capability"; CDNA 3 ISA reference.
CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 163 << 10, ("HMMA",)),
    "sm_86": Chip("cuda", 86, 32, 99 << 10, ("HMMA",)),
    "sm_89": Chip("cuda", 89, 32, 99 << 10, ("HMMA",)),
    "sm_90": Chip("cuda", 90, 32, 227 << 10, ("HGMMA",)),
    # Triton multiplies tiles that are too small for the tensor memory with the older instruction.
    "sm_100": Chip("cuda", 100, 32, 227 << 10, ("UTCHMMA", "HMMA")),
    "sm_120": Chip("cuda", 120, 32, 99 << 10, ("HMMA",)),
    "gfx942": Chip("hip", "gfx942", 64, 64 << 10, ("mfma",)),
}
