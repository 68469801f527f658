"""The compiled modules of csrc/cuda: which there are, how they are compiled, and what one says of itself.

The build reads this file as well, where neither torch nor this package can be imported: it imports nothing but Python's
own library.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = ["CAPABILITY", "DTYPES", "HEAD_DIMS", "MODULES", "NVCC_FLAGS", "NVRTC_FLAGS", "ModuleSpec", "constants"]

# Compute capability: the kernels use instructions that exist in sm_90a only, which no other device runs.
CAPABILITY = (9, 0)
_TARGET, _STANDARD = "90a", "c++17"
NVCC_FLAGS = (f"-std={_STANDARD}", f"-gencode=arch=compute_{_TARGET},code=sm_{_TARGET}", "-cubin")
NVRTC_FLAGS = (f"--gpu-architecture=sm_{_TARGET}", f"--std={_STANDARD}")

# Short names of the dtypes, see `deberta_kernels.dtypes`; a name that csrc/cuda/names.h knows.
DTYPES = ("bf16", "fp16")
# Pass: the head sizes it is compiled for.
HEAD_DIMS = {"forward": (64, 128), "backward": (64,)}
_ELF, _CONSTANT_BANK = b"\x7fELF", b".nv.constant3"
_INFO = struct.Struct("<7i")  # ForwardInfo and BackwardInfo of csrc/cuda/params.h


class ModuleSpec(NamedTuple):
    """A compiled module: what it is compiled for, and the names that follow from that.

    Attributes:
        which: "forward" or "backward".
        dtype: one of `DTYPES`.
        head_dim: D.
    """

    which: str
    dtype: str
    head_dim: int

    @property
    def name(self) -> str:
        """Name of its file without ".cubin"; its kernels' names begin alike."""
        return f"{self.which}_{self.dtype}_d{self.head_dim}"

    @property
    def source(self) -> str:
        """File of csrc/cuda to compile."""
        return f"{self.which}.cu"

    @property
    def definitions(self) -> tuple[str, str]:
        """What the source is compiled with, beside the flags."""
        return f"-DDK_DTYPE={self.dtype}", f"-DDK_HEAD_DIM={self.head_dim}"

    def kernel(self, pair: bool, dropout: bool) -> str:
        """Return the name of its kernel for calls with or without a pair mask and dropout."""
        return f"disentangled_{self.name}{'_pair' if pair else ''}{'_dropout' if dropout else ''}"

    @property
    def conversion(self) -> str:
        """Name of the kernel that ends a backward: it converts dq."""
        return f"disentangled_backward_dq_{self.dtype}_d{self.head_dim}"

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels for all kinds of calls."""
        return [self.kernel(pair, dropout) for pair in (False, True) for dropout in (False, True)]


MODULES = tuple(
    ModuleSpec(which, dtype, head_dim)
    for which, head_dims in HEAD_DIMS.items()
    for dtype in DTYPES
    for head_dim in head_dims
)


def constants(cubin: bytes) -> tuple[int, ...]:
    """Return the seven integers of `disentangled_<pass>_info`, the only data in constant bank 3 of a compiled module.

    Raises:
        ValueError, IndexError, struct.error: it is no module, or a damaged one.
    """
    if cubin[:4] != _ELF:
        raise ValueError("it is no ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        if cubin[start : cubin.index(b"\0", start)] == _CONSTANT_BANK and length >= _INFO.size:
            return _INFO.unpack_from(cubin, offset)
    raise ValueError("it holds no disentangled_*_info")
