"""Calls in which something is empty: samples without keys, sequences without tokens, prefixes that are all there is."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import Masks

TERMS = ("c2p+p2c", "c2p", "p2c", "none")
LENGTHS = (1, 4, 40, 130, 200)


def check(target, problem, case):
    dout = inputs.dout(case, problem)
    torch.manual_seed(case.seed)
    return budget.check(target.run, problem, dout, label=target.name)


def case_of(target, **changes):
    return target.fitted(Case(**{"batch": 3, "heads": 2, "nq": 40, "head_dim": 8, "position_buckets": 8, **changes}))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", ["key", "query", "pair"])
def test_samples_without_a_pair_that_is_allowed(target, kind, length, terms):
    case = case_of(target, nq=length, terms=terms)
    problem = inputs.problem(case, target.device)
    shape = {"key": (3, length), "query": (3, length), "pair": (3, 1, length, length)}[kind]
    mask = torch.ones(shape, dtype=torch.bool, device=target.device)
    mask[1] = False
    for given in (mask, torch.zeros_like(mask)):
        check(target, replace(problem, masks=Masks(**{kind: given})), case)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_key_is_allowed_beside_queries_that_are_padding(target, dtype, terms):
    case = case_of(target, dtype=dtype, terms=terms, dropout_p=0.3)
    problem = inputs.problem(case, target.device)
    key = torch.zeros(3, 40, dtype=torch.bool, device=target.device)
    query = torch.arange(40, device=target.device).expand(3, 40) % 3 > 0
    check(target, replace(problem, masks=Masks(key=key, query=query.contiguous())), case)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(
    ("queries", "prefix", "keys"), [(1, 1, 1), (5, 5, 5), (20, 33, 33), (33, 16, 16), (140, 20, 20)]
)
def test_prefixes_that_are_all_the_keys(target, queries, prefix, keys, terms):
    case = case_of(target, nq=queries, nk=keys, prefix_length=prefix, terms=terms)
    problem = inputs.problem(case, target.device)
    check(target, problem, case)
    key = torch.zeros(3, keys, dtype=torch.bool, device=target.device)
    check(target, replace(problem, masks=Masks(key=key)), case)
    key[:, -1] = True
    check(target, replace(problem, masks=Masks(key=key)), case)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("starts", [(0, 0, 5), (0, 5, 5, 5, 9), (0, 0), (0, 0, 0, 17, 17), (0, 1, 2, 3)])
def test_sequences_without_tokens(target, starts, terms):
    case = case_of(target, batch=1, nq=starts[-1] or 1, terms=terms)
    problem = inputs.problem(case, target.device)
    tokens = {name: getattr(problem, name)[:, :, : starts[-1]] for name in ("q", "k", "v")}
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=target.device)
    longest = max(stop - start for start, stop in pairwise(starts))
    packed = replace(problem, **tokens, cu_seqlens=cu_seqlens, max_seqlen=longest)
    if starts[-1]:
        check(target, packed, case)
    else:
        torch.manual_seed(case.seed)
        out, lse = target.run(packed)
        assert (out.shape[2], lse.shape[2]) == (0, 0)
