"""No kernel touches a byte outside the tensors it was given: each lies beside a page that cannot be read."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deberta_kernels import env, native
from deberta_kernels.impl import cpu
from deberta_kernels.linear import hidden_dropout, products
from deberta_kernels.models.position_tables import content_key
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import Masks
from tests.guard import PLACES, guarded
from tests.sanitizers import reporting_here

ROOT = Path(__file__).resolve().parents[2]
STATUS = native.library_status()
needs_library = pytest.mark.skipif(not STATUS["loaded"], reason=f"{STATUS['reason']}")
ISAS = STATUS["variants"]
# What multiplies linear layers: variants with the dtypes they have products for.
WAYS = [(isa, torch.float32) for isa in ISAS] + [(isa, torch.bfloat16) for isa in ISAS if env.multiplies_bfloat16(isa)]

CASES = [
    Case(batch=2, heads=2, nq=nq, nk=nk, head_dim=head_dim, dtype=dtype, **more)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for nq, nk, head_dim, more in (
        (1, 1, 1, {"mask": "right"}),
        (3, 3, 8, {"mask": "all_padding"}),
        (17, 17, 13, {"mask": "holes_tokens"}),
        (33, 33, 20, {"mask": "sparse", "dropout_p": 0.2}),
        (65, 65, 64, {"mask": "right", "reachable": True}),
        (40, 47, 31, {"prefix_length": 7}),
        (7, 7, 16, {"prefix_length": 7}),
        (35, 19, 17, {"mask": "heads", "terms": "p2c"}),
        (75, 75, 24, {"terms": "c2p", "position_buckets": 16, "max_relative_positions": 40}),
        (41, 41, 48, {"packed": True}),
    )
]


@pytest.mark.parametrize("place", PLACES)
def test_the_pages_are_guarded(place):
    code = (
        "import ctypes, torch\n"
        "from tests.guard import guarded\n"
        f"x = guarded(torch.zeros(100), {place!r})\n"
        f"at = x.data_ptr() + ({{'start': -1, 'end': 400}}[{place!r}])\n"
        "print('before', flush=True)\n"
        "ctypes.string_at(at, 1)\n"
        "print('after', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=reporting_here(), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "before\n"
    assert done.returncode != 0


@pytest.mark.usefixtures("same_bits")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_attention_keeps_within_its_tensors(target, case, place):
    problem = inputs.problem(case, target.device)
    dout = inputs.dout(case, problem)
    torch.manual_seed(case.seed)
    expected = budget.evaluate(target.run, problem, dout)
    tensors = {name: guarded(getattr(problem, name), place) for name in (*budget.INPUTS, "cu_seqlens")}
    masks = Masks(*(guarded(x, place) for x in vars(problem.masks).values()))
    torch.manual_seed(case.seed)
    results = budget.evaluate(target.run, replace(problem, **tensors, masks=masks), guarded(dout, place))
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


@needs_library
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 18, 131])
def test_what_a_forward_leaves_and_prepares_is_read_to_its_end_only(length, dtype, isa, place):
    case = Case(batch=1, heads=3, nq=length, head_dim=19, dtype=dtype, position_buckets=16)
    problem = inputs.problem(case)
    with native.use_isa(isa):
        out, lse = cpu.forward(problem)
        expected = cpu.backward(problem, out, lse, out, lse, (True,) * 5)
        prepared = guarded(cpu.prepare(problem.pos_key, problem.pos_query, problem.position), place)
        again = cpu.forward(replace(problem, prepared=prepared))
        out, lse, dout, dlse = (guarded(x, place) for x in (out, lse, out, lse))
        found = cpu.backward(problem, dout, dlse, out, lse, (True,) * 5)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@needs_library
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("isa", "dtype"), WAYS)
@pytest.mark.parametrize(("tokens", "features", "outputs"), [(1, 2, 16), (17, 34, 32), (33, 514, 48), (130, 66, 16)])
def test_linear_layers_keep_within_their_tensors(tokens, features, outputs, dtype, isa, place):
    x, weight, bias = torch.randn(tokens, features), torch.randn(outputs, features), torch.randn(outputs)
    tensors = [tensor.to(dtype) for tensor in (x, weight, bias)]
    with native.use_isa(isa):
        expected = products.natively(*tensors)
        assert torch.equal(products.natively(*(guarded(tensor, place) for tensor in tensors)), expected)


@needs_library
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 33, 515])
def test_dropout_of_hidden_states_keeps_within_its_tensors(count, dtype, isa, place):
    x, residual = torch.randn(count).to(dtype), torch.randn(count)
    with native.use_isa(isa):
        expected = hidden_dropout._drop(x, residual, 0.3, 7, torch.float32)
        found = hidden_dropout._drop(guarded(x, place), guarded(residual, place), 0.3, 7, torch.float32)
    assert torch.equal(found, expected)


@needs_library
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 15, 16, 17, 1023, 1024, 1025, 2000])
def test_the_content_key_keeps_within_the_weight(count, isa, place):
    weight = torch.randn(count)
    with native.use_isa(isa):
        assert content_key(guarded(weight, place))[1:] == content_key(weight)[1:]
