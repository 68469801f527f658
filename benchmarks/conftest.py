"""Time only when asked."""

import pytest


def pytest_configure(config):
    """Switch timing off in a run of all tests; naming a file of this folder, or --benchmark-enable, asks for it."""
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and hasattr(config.option, "benchmark_disable"):
        config.option.benchmark_disable = not config.option.benchmark_enable
