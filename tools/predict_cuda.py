"""Estimate the time of the CUDA kernels from their compiled instructions, by the rule and device of predict.py.

    python tools/predict_cuda.py

What differs from the Triton kernels is counted exactly here, since the kernels lay their memory out themselves:
operands that come from registers, the width of loads and stores, tiles that two warpgroups share, and the sums of the
backward, which pass through shared memory and L2. No bank conflicts are assumed. SDPA's flash kernel is taken at its
usual rate for heads of 64, a lead and no measurement. nvcc and nvdisasm are needed, no GPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from offline import cuda
from offline.counting import Counts
from predict import DEVICE, HEADS, MATRIX_FLOPS, OPERAND, SATURATED, TILE, TOKENS, WARPS, overlapped

from deberta_kernels.demo.tables import aligned
from deberta_kernels.impl.cuda.modules import ModuleSpec

LENGTHS = (512, 1024, 2048, 4096, 8192)
ROWS = 128
SDPA_FLOPS = 350e12
# 16 columns or rows of an operand of 64, per product.
STEP = OPERAND // 4
# What a warpgroup's sum of 64 x 64 takes, in float32.
SUM = TILE * TILE * 4


@dataclass(frozen=True)
class Pass:
    """What one pass over 64 x 64 pairs moves beside what its instructions tell.

    Attributes:
        loaded: operand tiles that the block loads for its two warpgroups.
        first_operands: products whose first operand is in shared memory.
        added: bytes that the copy engine adds to sums in L2.
    """

    loaded: int
    first_operands: int
    added: int = 0


# Near tiles of the forward take the keys from shared memory, 8 times. The backward's far tiles do so with the gradients
# of scores, for those of queries, of which each warpgroup adds half; its near tiles have all but three products' first
# operands there (those by values, weights and gradients of scores), and add the gradients of a block of each table.
FORWARD = Pass(4, 8), Pass(2, 0)
BACKWARD = Pass(4, 48, SUM // 2 + 2 * SUM), Pass(2, 4, SUM // 2)


def cycles(counts: Counts, moved: Pass) -> float:
    """Return the estimated cycles of one pass over 64 x 64 pairs."""
    operands = STEP * (counts.matrix + moved.first_operands)
    return overlapped({
        "issue": counts.instructions,
        "matrix": counts.matrix * MATRIX_FLOPS / DEVICE.flops,
        "exponentials": TILE * TILE / DEVICE.exponentials,
        "shared": WARPS * counts.wavefronts + (operands + moved.added) / DEVICE.shared_bytes,
        "l2": (moved.loaded * OPERAND * TILE / ROWS + moved.added) / DEVICE.l2_bytes,
    })  # fmt: skip


def milliseconds(length: int, near: float, far: float) -> float:
    """Return the time of all passes of a length, given the cycles of one."""
    near_passes, far_passes = passes(length)
    heads = HEADS * (TOKENS // length)
    return 1e3 * heads * (near_passes * near + far_passes * far) / (DEVICE.multiprocessors * DEVICE.clock)


def passes(length: int) -> tuple[int, int]:
    """Return how many 64 x 64 passes of one head are in near tiles of 128 x 64, and how many in far ones.

    The 128 are queries in the forward and keys in the backward.
    """
    near = far = 0
    for row in range(0, length, ROWS):
        for key in range(0, length, TILE):
            is_near = row - key - (TILE - 1) < SATURATED and row - key + ROWS - 1 > -SATURATED
            near, far = near + 2 * is_near, far + 2 * (not is_near)
    return near, far


def main() -> int:
    """Print the estimates."""
    loops = {}
    for which, moved in (("forward", FORWARD), ("backward", BACKWARD)):
        spec = ModuleSpec(which, "bf16", 64)
        try:
            report = cuda.compile_module(spec)[spec.kernel(pair=False, dropout=False)]
        except RuntimeError as error:
            raise SystemExit(f"tools/predict_cuda.py: {error}") from error
        loops[which] = cycles(report.near, moved[0]), cycles(report.far, moved[1])
        print(f"cycles of one pass over 64 x 64 pairs, {which}: near %.0f, far %.0f" % loops[which])
    rows = [["length", "forward ms", "SDPA flash ms", "of its speed", "backward ms"]]
    for length in LENGTHS:
        flash = 1e3 * HEADS * (TOKENS // length) * length**2 * 4 * TILE / SDPA_FLOPS
        forward, backward = (milliseconds(length, *loops[which]) for which in ("forward", "backward"))
        rows.append([str(length), f"{forward:.3f}", f"{flash:.3f}", f"{flash / forward:.2f}", f"{backward:.3f}"])
    print("\n" + aligned(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
