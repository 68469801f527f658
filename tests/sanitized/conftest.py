"""The option of `make test-sanitized`, for every test that is named beside this folder."""

from __future__ import annotations

import pytest

from tests import sanitizers


def pytest_addoption(parser):
    parser.addoption(
        "--sanitized",
        action="store_true",
        help="run only what runs in the native library, and fail unless that is the one of `build_native --sanitize`",
    )


def pytest_configure(config):
    if config.getoption("--sanitized", False) and (reason := sanitizers.absence()) is not None:
        raise pytest.UsageError(f"--sanitized: {reason}; use `make test-sanitized`")


def pytest_collection_modifyitems(config, items):
    """Leave out the targets that compute elsewhere."""
    if not config.getoption("--sanitized", False):
        return
    targets = [getattr(getattr(item, "callspec", None), "params", {}).get("target") for item in items]
    others = [item for item, target in zip(items, targets) if target is not None and target.backend != "cpu"]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]
