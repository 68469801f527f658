"""The option of `make test-aarch64`, for every test that is named beside this folder."""

from __future__ import annotations

import pytest

from tests import emulation, selection


def pytest_addoption(parser):
    parser.addoption(
        "--emulated",
        action="store_true",
        help="run only what runs in the native library, and fail unless that is the one of an emulated aarch64",
    )


def pytest_configure(config):
    if config.getoption("--emulated", False) and (reason := emulation.absence()) is not None:
        raise pytest.UsageError(f"--emulated: {reason}; use `make test-aarch64`")


def pytest_ignore_collect(config):
    """Leave this folder out where nothing is emulated."""
    return None if config.getoption("--emulated", False) else True


def pytest_collection_modifyitems(config, items):
    """Leave out the targets that compute elsewhere, and the one that is the fastest variant once more."""
    if config.getoption("--emulated", False):
        targets = {item: selection.target_of(item) for item in items}
        selection.keep(config, items, [item for item, t in targets.items() if t is None or t.isa is not None])
