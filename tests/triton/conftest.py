"""Let the tests of the programs in tools/ and benchmarks/ import their parts, which are no packages of the project."""

import sys
from pathlib import Path

from tests import needs

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]


def pytest_ignore_collect():
    """Leave this folder out where Triton is not installed."""
    return needs.missing("triton") or None
