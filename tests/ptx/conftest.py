"""Let the tests import the machine, and leave them out where there is no C++ compiler to build it with."""

import sys
from pathlib import Path

from tests import needs

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]


def pytest_ignore_collect():
    """Leave this folder out without a compiler; `make test-ptx` requires one."""
    return True if needs.COMPILER is None and "compiler" not in needs.required else None
