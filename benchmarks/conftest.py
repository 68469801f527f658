"""Let the files of tests here import their neighbours, which run as plain scripts otherwise; time only when asked."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_configure(config):
    """Switch timing off in a run of all tests; naming a file of this folder, or --benchmark-enable, asks for it."""
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and hasattr(config.option, "benchmark_disable"):
        config.option.benchmark_disable = not config.option.benchmark_enable
