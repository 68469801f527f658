"""Let the tests import the machine, and leave them out where there is no C++ compiler to build it with."""

import sys
from pathlib import Path

import pytest

from tests import needs
from tests.ptx import sharing

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]


def pytest_ignore_collect():
    """Leave this folder out without a compiler; `make test-ptx` requires one."""
    return True if needs.machine_absence() else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let tests of one variant share a process."""
    return sharing.make_scheduler(config, log)
