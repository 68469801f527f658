"""The command line of the measurements: `python -m benchmarks KIND`."""

from __future__ import annotations

import importlib
import sys

KINDS = {"host": "benchmarks.host"}


def main() -> int:
    """Run the kind named first; the others are programs of their own."""
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        print(f"usage: python -m benchmarks {{{','.join(KINDS)}}} [options]", file=sys.stderr)
        return 2
    return int(importlib.import_module(KINDS[sys.argv[1]]).main(sys.argv[2:]) or 0)


if __name__ == "__main__":
    sys.exit(main())
