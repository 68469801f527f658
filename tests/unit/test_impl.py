"""What the backends share: sizes of a call, prepared tables, and that none of them imports another."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deberta_kernels import impl
from deberta_kernels.impl import common
from deberta_kernels.impl.gpu_tables import Ends, Window, check_prepared, ends_of, shared_index
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import PositionSpec

FOLDER = Path(impl.__file__).parent
SHARED = {"attempts", "cache", "common", "gpu_tables"}
ENDS = Ends(-500, 505)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_backend_imports_what_backends_share_and_itself(path):
    own = path.relative_to(FOLDER).parts[0].removesuffix(".py")
    found = {name.split(".")[2] for name in imported(path) if name.startswith("deberta_kernels.impl.")}
    assert found <= SHARED | {own}
    above = tuple(f"deberta_kernels.{room}" for room in ("api", "ops", "dispatch", "models", "linear", "integrations"))
    assert not [name for name in imported(path) if name.startswith(above)]


def test_the_extent_of_packed_sequences_is_that_of_the_longest():
    problem = inputs.problem(Case(batch=3, heads=2, nq=20, packed=True))
    lengths = problem.cu_seqlens.diff().tolist()
    assert common.extent(problem) == (3, problem.max_seqlen, problem.max_seqlen)
    assert [tokens.stop - tokens.start for tokens in common.sequences(problem.cu_seqlens)] == lengths
    assert common.extent(inputs.problem(Case(batch=3, heads=2, nq=20, nk=30))) == (3, 20, 30)


def test_position_terms_need_a_table_and_a_key_behind_the_prefix():
    problem = inputs.problem(Case(batch=1, heads=1, nq=4, nk=10, prefix_length=7))
    assert (common.positioned_keys(problem), common.has_positions(problem)) == (3, True)
    assert not common.has_positions(replace(problem, pos_key=None, pos_query=None))
    assert common.has_positions(replace(problem, pos_key=None))
    assert not common.has_positions(replace(problem, k=problem.k[:, :, :7], v=problem.v[:, :, :7]))


def test_zero_gradients_are_those_asked_for():
    problem = inputs.problem(Case(batch=1, heads=1, nq=4, terms="c2p"))
    found = common.zero_gradients(problem, (True, False, True, True, True))
    assert [x is not None for x in found] == [True, False, True, True, False]
    assert torch.equal(found.dq, torch.zeros_like(problem.q))
    assert torch.equal(found.dpos_key, torch.zeros_like(problem.pos_key))


def test_results_are_laid_out_as_the_next_projection_reads_them():
    out, lse = common.empty_results(torch.empty(2, 3, 5, 8, dtype=torch.float16))
    assert (out.shape, out.dtype, out.stride()) == ((2, 3, 5, 8), torch.float16, (120, 8, 24, 1))
    assert (lse.shape, lse.dtype) == ((2, 3, 5), torch.float32)
    assert common.empty_results(torch.empty(1, 1, 1, 1, dtype=torch.float64))[1].dtype == torch.float64


def test_refusals_say_what_would_do():
    assert common.dtype_refusal(torch.float64, (torch.float16,)) == "it computes float16, not float64"
    assert common.device_refusal(torch.device("meta"), "cuda") == "it runs on cuda tensors, not meta"
    assert common.head_dim_refusal(256, 256) is None
    assert common.head_dim_refusal(257, 256) == "head_dim 257 is more than 256"
    assert common.scale_refusal(0.0) == "the scale is not positive"


def test_distances_on_both_sides_of_zero_are_near_even_where_nothing_is():
    assert ends_of(shared_index(1, PositionSpec())) == (-512, 506)
    assert ends_of(shared_index(1, PositionSpec(0, 1))) == (-1, 0)
    assert ENDS.window(10, 20, 3) == Window(-22, 34)
    assert ENDS.full_window(5) == Window(-505, 1015)
    assert Ends(-5000, 5000).full_window(5) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :, 1:],
        lambda x: x.bfloat16(),
        lambda x: x.to("meta"),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ],
    ids=["shape", "dtype", "device", "layout"],
)
def test_tables_prepared_for_something_else_are_refused(change):
    q, covered = torch.zeros(1, 3, 5, 8), Window(-4, 9)
    prepared = torch.zeros(2, 3, 9, 8)
    assert check_prepared(prepared, q, covered, 8) == covered
    with pytest.raises(ValueError, match=r"^prepared must be what prepare returned .*; prepare the tables again\.$"):
        check_prepared(change(prepared), q, covered, 8)
    with pytest.raises(ValueError, match="where the kernels read None"):
        check_prepared(prepared, q, None, 8)
