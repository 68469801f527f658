"""Every barrier, wait, fence and arrival that the CUDA kernels execute is missed, or listed with the reason why not.

An entry of `redundant_cuda.json` names kernels, opcode and place in the source, how many compiled instructions there
nobody misses, and what else orders the same. One that is out of date fails as one that is missing does.
"""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from ptx.drivers import cuda_modules
from ptx.mutations import is_ordering

from deberta_kernels.impl.cuda import image
from deberta_kernels.impl.cuda.modules import HEAD_DIMS, MODULES
from tests.ptx.kernels import cuda_mutants
from tests.ptx.kernels.cuda_launches import VARIANTS, launches
from tests.ptx.kernels.problems import BF16
from tests.ptx.kernels.source_places import SourcePlaces

LIST = Path(__file__).with_name("redundant_cuda.json")
KERNELS = [
    pytest.param(which, dtype, head_dim, variant, id=f"{which}-{dtype}-D{head_dim}{variant}".replace("torch.", ""))
    for which in ("forward", "backward")
    for dtype in image.DTYPES
    for head_dim in HEAD_DIMS[which]
    for variant in VARIANTS
]
# One of so many is tried where time is short.
STEP = 12


def listed(kernel):
    return {entry["place"]: entry for entry in json.loads(LIST.read_text()) if kernel in entry["kernels"]}


def family(name):
    """Return a kernel's name without its dtype: the two differ in what they convert alone."""
    return name.replace("_bf16", "").replace("_fp16", "")


def unnoticed(found, chosen=list):
    """Return how many at each place nobody misses."""
    places = Counter()
    for mutant, what in cuda_mutants.outcomes(found, chosen):
        if not what:
            places[cuda_mutants.place_of(found[0].machine, mutant)] += 1
    return places


@pytest.mark.every_case
@pytest.mark.parametrize(("which", "dtype", "head_dim", "variant"), KERNELS)
def test_what_orders_something_is_missed_or_listed(which, dtype, head_dim, variant):
    with launches(which, dtype, head_dim, variant) as by_kernel:
        for name, found in by_kernel.items():
            expected = {place: entry["count"] for place, entry in listed(family(name)).items()}
            assert dict(unnoticed(found)) == expected, name


def test_a_sample_is_missed_or_listed():
    with launches("forward", BF16, 64, "") as by_kernel:
        for name, found in by_kernel.items():
            known = listed(family(name))
            places = unnoticed(found, lambda mutants: mutants[::STEP])
            assert {p: n for p, n in places.items() if n > known.get(p, {"count": 0})["count"]} == {}


@pytest.mark.parametrize("module", [pytest.param(m, id=m.name) for m in MODULES if "bf16" in m.name])
def test_the_producer_copies_only_once_every_lane_has_waited(module):
    """The machine runs the lanes of a warp in step; on a device one that is late could miss a phase of a barrier."""
    ptx = cuda_modules.compile_module(module)
    places = SourcePlaces(ptx, cuda_modules.SOURCES)
    opcodes = [(n, re.match(r"\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)", text)) for n, text in enumerate(ptx.split("\n"), 1)]
    ordering = [(n, found[1]) for n, found in opcodes if found and is_ordering(found[1])]
    waits = [
        after
        for (line, opcode), (_, after) in pairwise(ordering)
        if opcode.startswith("mbarrier.try_wait") and "producer.h" in places.of(line)
    ]
    assert waits
    assert set(waits) == {"bar.warp.sync"}


def test_every_entry_has_a_reason_and_names_kernels():
    for entry in json.loads(LIST.read_text()):
        assert entry.keys() == {"kernels", "place", "count", "reason"}
        assert entry["kernels"]
        assert entry["count"] > 0
        assert len(entry["reason"]) > 20
