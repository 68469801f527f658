"""What a patched model does beside its kernels: Python frames of a layer, host time of a forward and of one call.

To compare two checkouts, run it in each of them in turns: cd CHECKOUT && python -m benchmarks host
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import host_call, host_frames


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--top", type=int, default=0, metavar="N", help="also name the N functions entered most often")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    host_frames.report(chosen.top)
    host_call.report()
    return 0
