"""The native library is there, with every variant that this machine compiles and runs; other tests go by those."""

import json
import platform
from pathlib import Path

import pytest

from deberta_kernels import env, native
from tests import needs


def test_it_is_loaded_where_it_can_be_built():
    needs.native_library()
    assert native.opened() is not None


def test_it_has_every_variant_that_was_compiled_and_that_the_processor_runs():
    needs.native_library()
    information = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not information.exists():
        pytest.skip("there is no list of this processor's instructions to compare with")
    lines = information.read_text().splitlines()
    processor = set(next(line for line in lines if line.startswith("flags")).split())
    status = native.library_status()
    record = json.loads((Path(status["path"]).parent / "build.json").read_text())
    assert record["variants"][0] == "generic"
    expected = [name for name in record["variants"] if processor.issuperset(env.ISA_FEATURES[name])]
    assert sorted(status["variants"]) == sorted(expected)
    assert set(record["variants"]) | set(record.get("left_out", {})) == set(env.CPU_ISAS)
