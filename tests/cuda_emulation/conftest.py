"""Skip these tests where there is no C++ compiler to build the emulation with."""

import shutil
from pathlib import Path

import pytest

from tests.cuda_emulation import harness

FOLDER = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    if shutil.which(harness.COMPILER) is None:
        for item in items:
            if FOLDER in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=f"there is no C++ compiler ({harness.COMPILER})"))
