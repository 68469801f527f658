"""The values that travel: a problem and the arguments of an operator, masks that are mapped."""

import dataclasses

import torch

from deberta_kernels import ops  # noqa: F401, which defines the operators
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec


def test_a_problem_is_the_same_after_it_was_the_arguments_of_an_operator():
    """Every field has a value of its own, so that none can take another's place."""
    x = [torch.ones(1) for _ in range(11)]
    position = PositionSpec(8, 16, 3, 2)
    problem = AttentionProblem(*x[:5], Masks(*x[5:8]), position, 0.2, 0.1, x[8], x[9], 7, x[10])
    arguments = problem.arguments()
    assert len(arguments) + 1 == len(torch.ops.deberta_kernels.attention.default._schema.arguments)
    again = AttentionProblem.of_arguments((*arguments, "torch"))
    for field in dataclasses.fields(AttentionProblem):
        before, after = getattr(problem, field.name), getattr(again, field.name)
        assert before is after or before == after, field.name


def test_masks_are_mapped_part_by_part_and_one_tensor_stays_one():
    tokens, pair = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mapped = Masks(tokens, tokens, pair).map(torch.logical_not)
    assert mapped.key is mapped.query
    assert not mapped.key.any()
    assert not mapped.pair.any()
    assert Masks(query=tokens).map(torch.clone).key is None
    assert Masks().map(torch.clone) == Masks()
