"""The option of `make test-aarch64`, for every test that is named beside this folder."""

from __future__ import annotations

import pytest

from tests import emulation, selection

# Cases of one test that each variant runs: emulated bfloat16 products take a hundred times as long.
_SAMPLE = 6


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
    """Leave out the targets that compute elsewhere, and the one that is the fastest variant once more; take samples."""
    if not config.getoption("--emulated", False):
        return
    targets = {item: selection.target_of(item) for item in items}
    kept = [item for item, target in targets.items() if target is None or target.isa is not None]
    if not config.getoption("--every-case"):
        kept = selection.sampled(kept, _test_of_a_variant, _SAMPLE)
    selection.keep(config, items, kept)


def _test_of_a_variant(item):
    target, parameters = selection.target_of(item), getattr(getattr(item, "callspec", None), "params", {})
    return getattr(item, "function", item), target, parameters.get("isa")
