"""Leave these tests out where there is no C++ compiler to build the emulation with."""

import shutil

from tests.cuda_emulation import harness


def pytest_ignore_collect():
    return True if shutil.which(harness.COMPILER) is None else None
