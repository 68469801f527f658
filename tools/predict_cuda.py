"""Estimate the time of the CUDA forward from its compiled instructions, by the rule and device of predict.py.

    python tools/predict_cuda.py

What differs from the Triton kernels is counted exactly here, since the kernel lays its memory out itself: operands that
come from registers, loads of 8 bytes, no bank conflicts, and tiles that two warpgroups share. SDPA's flash kernel is
taken at its usual rate for heads of 64, a lead and no measurement. nvcc and nvdisasm are needed, no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from offline import cuda
from offline.counting import Counts
from offline.table import aligned
from predict import DEVICE, HEADS, MATRIX_FLOPS, OPERAND, SATURATED, TILE, TOKENS, WARPS, overlapped

LENGTHS = (512, 1024, 2048, 4096, 8192)
KERNEL = "disentangled_forward_bf16_d64"
ROWS = 128
SDPA_FLOPS = 350e12
# 16 columns or rows of an operand of 64, per product; near tiles take the keys from there as first operand, 8 times.
STEP = OPERAND // 4
KEYS_FIRST = 8


def cycles(counts: Counts, loaded: int, first_operands: int) -> float:
    """Return the estimated cycles of one pass over 64 x 64 pairs.

    Args:
        counts: of the pass.
        loaded: operand tiles that the block loads for its two warpgroups.
        first_operands: products whose first operand is in shared memory.
    """
    wavefronts = WARPS * (counts.shared_stores + 2 * (counts.shared_loads - 1))
    operands = STEP * (counts.matrix + first_operands)
    return overlapped({
        "issue": counts.instructions,
        "matrix": counts.matrix * MATRIX_FLOPS / DEVICE.flops,
        "exponentials": TILE * TILE / DEVICE.exponentials,
        "shared": wavefronts + operands / DEVICE.shared_bytes,
        "l2": loaded * OPERAND * TILE / ROWS / DEVICE.l2_bytes,
    })  # fmt: skip


def passes(length: int) -> tuple[int, int]:
    """Return how many 64 x 64 passes of one head are in near tiles of 128 x 64, and how many in far ones."""
    near = far = 0
    for row in range(0, length, ROWS):
        for key in range(0, length, TILE):
            is_near = row - key - (TILE - 1) < SATURATED and row - key + ROWS - 1 > -SATURATED
            near, far = near + 2 * is_near, far + 2 * (not is_near)
    return near, far


def main() -> int:
    """Print the estimates."""
    report = cuda.compile_module("forward", "bf16", 64)[KERNEL]
    near, far = cycles(report.near, 4, KEYS_FIRST), cycles(report.far, 2, 0)
    print(f"cycles of one pass over 64 x 64 pairs: near {near:.0f}, far {far:.0f}\n")
    rows = [["length", "forward ms", "SDPA flash ms", "of its speed"]]
    for length in LENGTHS:
        heads = HEADS * (TOKENS // length)
        near_passes, far_passes = passes(length)
        ours = heads * (near_passes * near + far_passes * far) / (DEVICE.multiprocessors * DEVICE.clock)
        flash = heads * length**2 * 4 * TILE / SDPA_FLOPS
        rows.append([str(length), f"{1e3 * ours:.3f}", f"{1e3 * flash:.3f}", f"{flash / ours:.2f}"])
    print(aligned(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
