"""Every block of Python in the documents runs by itself, on a CPU, with tiny models in the place of downloads."""

from __future__ import annotations

import pytest

from tests import needs
from tests.checkout import ROOT
from tests.docs.blocks import Block, blocks

ALL = blocks(ROOT)
RUNNING = [
    pytest.param(block, id=block.name, marks=pytest.mark.packages(*block.packages)) for block in ALL if not block.reason
]


@pytest.mark.parametrize("block", RUNNING)
def test_a_block_runs_by_itself(block: Block, run_program):
    if "from ptx" in block.code and (absence := needs.machine_absence()) is not None:
        pytest.skip(absence)
    status, printed = run_program(block.code, block.checkpoints)
    if status:
        pytest.fail(f"{block.name} ended with {status}:\n{block.code}\n{printed[-4000:]}", pytrace=False)
    lines = iter(printed.splitlines())
    for answer in block.answers:
        if answer not in lines:  # which reads up to it
            pytest.fail(f"{block.name} does not print {answer!r} in its place, but\n{printed[-4000:]}", pytrace=False)


def test_no_block_is_left_out():
    assert {block.name: block.reason for block in ALL if block.reason} == {}


def test_a_block_that_fails_is_seen(run_program):
    status, printed = run_program("undefined_name")
    assert status == 1
    assert "NameError" in printed


def test_answers_are_compared():
    block = Block("made up", "print(1 + 1)  # -> 2\nprint(3)  # no answer\n", None)
    assert block.answers == ["2"]


def test_blocks_do_not_see_each_other(run_program):
    status, printed = run_program("import os, deberta_kernels as dk\nprint(os.listdir(), dk.stats()['calls']['torch'])")
    assert (status, printed) == (0, "[] 0\n")
