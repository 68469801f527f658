"""The sanitizers see what they are there for: a fault planted in each variant ends the process with its report."""

import platform
import subprocess
import sys

import pytest

from deberta_kernels import env, native
from deberta_kernels.native import processor
from tests import sanitizers

ABSENT = sanitizers.absence()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"{ABSENT}; `make test-sanitized` runs this")

CALL = """
import ctypes, sys
from deberta_kernels import native
library = native.need()
memory = ctypes.create_string_buffer(4096)
result = ctypes.create_string_buffer(32)
start = ctypes.addressof(result) + (-ctypes.addressof(result)) % 8
more, shift, variant = int(sys.argv[1]), int(sys.argv[2]), library.variants[sys.argv[3]]
library.handle.dk_cpu_checksum(memory, len(memory) + more, library.checksum_key, start + shift, variant)
print("done")
"""
ISAS = env.isas_of(platform.machine())
VARIANTS = [isa for isa in ISAS if processor.features().issuperset(env.ISA_FEATURES[isa])]


def call(isa, more=0, shift=0):
    command = [sys.executable, "-c", CALL, str(more), str(shift), isa]
    return subprocess.run(command, env=sanitizers.reporting_here(), capture_output=True, text=True, timeout=120)


def test_every_variant_that_this_processor_runs_is_watched():
    assert set(native.library_status()["compiled"]) == set(ISAS) or sys.platform != "linux"
    assert set(native.library_status()["variants"]) == set(VARIANTS)


@pytest.mark.parametrize("isa", VARIANTS)
def test_reading_past_the_end_is_reported(isa):
    done = call(isa, more=64)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "checksum" in done.stderr


@pytest.mark.parametrize("isa", VARIANTS)
def test_undefined_behaviour_is_reported(isa):
    done = call(isa, shift=1)
    assert done.returncode != 0
    assert "runtime error: store to misaligned address" in done.stderr


@pytest.mark.parametrize("isa", VARIANTS)
def test_the_same_call_without_a_fault_is_not(isa):
    done = call(isa)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
