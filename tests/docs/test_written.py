"""What scripts write into the documents is what is committed: drawings, and the tables of docs/support.md."""

from __future__ import annotations

import itertools
import xml.dom.minidom

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels import dtypes
from tests import needs
from tests.checkout import ROOT
from tools.documentation import drawings, support

MASKS = {"none": None, "key": (2, 5), "pair": (2, 1, 5, 5)}


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_drawing_is_what_the_script_draws(name):
    committed = (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == drawings.DRAWINGS[name](), "run `python tools/documentation/drawings.py`"
    xml.dom.minidom.parseString(committed)


def test_the_tables_of_support_are_what_the_script_writes():
    needs.native_library()
    committed = support.DOCUMENT.read_text(encoding="utf-8")
    assert committed == support.written(committed), "run `python tools/documentation/support.py`"


def test_a_document_without_a_table_is_refused():
    with pytest.raises(ValueError, match="written versions"):
        support.written("")


@pytest.mark.parametrize(("dtype", "mask", "gradients"), list(itertools.product(dtypes.FLOATS, MASKS, (False, True))))
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_explain_says_what_the_table_says(backend, dtype, mask, gradients):
    if backend == "cpu":
        needs.native_library()
    q = torch.randn(2, 2, 5, 16, dtype=dtype, requires_grad=gradients)
    table = torch.randn(2, 512, 16, dtype=dtype)
    keep = None if MASKS[mask] is None else torch.ones(MASKS[mask], dtype=torch.bool)
    chosen = dk.explain(q, q, q, table, table, attention_mask=keep, backend=backend).chosen
    assert (chosen == backend) == (dtypes.name(dtype) in support.computed(backend))
