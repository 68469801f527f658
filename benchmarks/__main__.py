"""The command line of the measurements: `python -m benchmarks KIND`."""

from __future__ import annotations

import importlib
import sys

# Kind: its module and what it measures. A module is imported when it runs: settings come before torch.
KINDS = {
    "core": ("benchmarks.core.run", "the attention core beside SDPA and eager code"),
    "model": ("benchmarks.model.run", "whole models beside eager, ONNX Runtime, OpenVINO and BERT"),
    "train": ("benchmarks.training.run", "training steps beside eager"),
    "linear": ("benchmarks.core.linear", "linear layers by number of tokens"),
    "adapters": ("benchmarks.training.adapters", "LoRA, prefixes and prompts, of AdapterHub and PEFT"),
    "memory": ("benchmarks.training.memory", "memory of training, the table of docs/training.md"),
    "convergence": ("benchmarks.training.convergence", "accuracy after fine-tuning with several seeds"),
    "soak": ("benchmarks.training.soak", "growth of resident memory over many steps"),
    "gpu": ("benchmarks.gpu.run", "the GPU kernels: proved, then timed"),
    "tune": ("benchmarks.gpu.tune", "tile sizes of the Triton kernels"),
    "host": ("benchmarks.host", "what a patched model does beside its kernels"),
    "report": ("benchmarks.report", "a stored result as tables and a picture"),
}


def main() -> int:
    """Run the kind named first."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print("usage: python -m benchmarks KIND [options]\n")
        print("\n".join(f"  {name:<12} {text}" for name, (_, text) in KINDS.items()))
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        print(f"usage: python -m benchmarks {{{','.join(KINDS)}}} [options]", file=sys.stderr)
        return 2
    return int(importlib.import_module(KINDS[sys.argv[1]][0]).main(sys.argv[2:]) or 0)


if __name__ == "__main__":
    sys.exit(main())
