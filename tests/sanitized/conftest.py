"""The option of `make test-sanitized`, for every test that is named beside this folder."""

from __future__ import annotations

import pytest

from tests import sanitizers, selection


def pytest_addoption(parser):
    parser.addoption(
        "--sanitized",
        action="store_true",
        help="run only what runs in the native library, and fail unless that is the one of `build_native --sanitize`",
    )


def pytest_configure(config):
    if config.getoption("--sanitized", False) and (reason := sanitizers.absence()) is not None:
        raise pytest.UsageError(f"--sanitized: {reason}; use `make test-sanitized`")


def pytest_ignore_collect(config):
    """Leave this folder out where nothing watches."""
    return None if config.getoption("--sanitized", False) else True


def pytest_collection_modifyitems(config, items):
    """Leave out the targets that compute elsewhere."""
    if config.getoption("--sanitized", False):
        targets = {item: selection.target_of(item) for item in items}
        selection.keep(config, items, [item for item, t in targets.items() if t is None or t.backend == "cpu"])
