"""Gradients are right for any strides of inputs and upstream gradients, and computed only where asked for."""

from dataclasses import replace

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case

NAMES = ("q", "k", "v", "pos_key", "pos_query")


@pytest.mark.parametrize("case", [
    Case(batch=3, heads=2, nq=nq, nk=nk, head_dim=24, dtype=dtype, layout=layout, dout=dout, reachable=True)
    for layout in inputs.LAYOUTS
    for dout in inputs.DOUTS
    for nq, nk, dtype in ((67, 67, torch.float32), (20, 33, torch.bfloat16))
], ids=lambda case: case.id)  # fmt: skip
def test_strides_of_inputs_and_upstream_gradients_are_honoured(check_case, case):
    check_case(case)


def differentiable(target, case):
    """Return the leaves of a case and a function that runs them through the public call."""
    problem = inputs.problem(case, target.device)
    target.need(problem.q)
    leaves = [getattr(problem, name).detach().requires_grad_() for name in NAMES]

    def run(q, k, v, pos_key, pos_query):
        return dk.disentangled_attention(
            q, k, v, pos_key, pos_query, attention_mask=problem.masks.key, backend=target.backend
        )

    return leaves, run


CASE = Case(batch=2, heads=3, nq=41, head_dim=16, mask="right")


@pytest.mark.parametrize("name", ["sum", "mean", "transpose", "cat", "step", "first_token", "square"])
def test_gradients_through_ordinary_tails_match_the_reference(target, name):
    weight = torch.randn(2, 41, 48, generator=torch.Generator().manual_seed(1))
    tails = {
        "sum": lambda out: out.sum(),
        "mean": lambda out: out.mean(),
        "transpose": lambda out: (out.transpose(1, 2).reshape(2, 41, 48) * weight.to(out)).sum(),
        "cat": lambda out: (torch.cat([out, 2 * out], -1) * torch.cat([out, out], -1).detach()).sum(),
        "step": lambda out: out[:, :, ::2].sum(),
        "first_token": lambda out: (out[:, :, 0] * out[:, :, 0]).sum(),
        "square": lambda out: out.square().sum(),
    }
    leaves, run = differentiable(target, CASE)
    ours = torch.autograd.grad(tails[name](run(*leaves)), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    mask = inputs.masks(CASE, target.device).key
    out = dk.disentangled_attention(*exact, attention_mask=mask, backend="reference")
    for leaf, gradient, expected in zip(NAMES, ours, torch.autograd.grad(tails[name](out), exact)):
        size = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=5e-6 * size, msg=lambda m, n=leaf: n + m)


def test_directional_derivatives_match_finite_differences(target):
    """The float64 reference is not involved: the forward of the target itself is the judge."""
    leaves, run = differentiable(target, CASE)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(leaves[0].shape, generator=generator).to(target.device)

    def loss(*tensors):
        return (run(*tensors).double() * weight).sum()

    gradients = torch.autograd.grad(loss(*leaves), leaves)
    for name, index in zip(NAMES, range(len(leaves))):
        direction = gradients[index] / gradients[index].norm()
        step = 0.02
        moved = [
            [x.detach() + (s * step * direction if i == index else 0) for i, x in enumerate(leaves)] for s in (1, -1)
        ]
        slope = float(loss(*moved[0]) - loss(*moved[1])) / (2 * step)
        assert slope == pytest.approx(float(gradients[index].norm()), rel=2e-3), name


@pytest.mark.parametrize(
    "wanted", [("q",), ("k",), ("v",), ("pos_key",), ("pos_query",), ("q", "v"), ("pos_key", "k")], ids="+".join
)
def test_only_the_inputs_that_require_grad_get_one(target, wanted):
    problem = inputs.problem(CASE, target.device)
    tensors = {name: getattr(problem, name).detach() for name in NAMES}
    every = budget.evaluate(target.run, problem, inputs.dout(CASE, problem))
    given = {name: x.requires_grad_(name in wanted) for name, x in tensors.items()}
    out, _ = target.run(replace(problem, **given))
    out.backward(inputs.dout(CASE, problem))
    for name, x in given.items():
        if name not in wanted:
            assert x.grad is None
        else:
            size = max(1.0, float(every[f"d{name}"].abs().max()))
            torch.testing.assert_close(x.grad, every[f"d{name}"], rtol=0, atol=3e-6 * size)


def test_result_without_gradients_is_the_same_and_needs_none(target):
    problem = inputs.problem(CASE, target.device)
    out = target.run(problem)[0]
    assert not out.requires_grad
    leaf = problem.q.detach().requires_grad_()
    with torch.no_grad():
        assert not target.run(replace(problem, q=leaf))[0].requires_grad
    with torch.inference_mode():
        assert torch.equal(target.run(problem)[0], out)
    watched = target.run(replace(problem, q=leaf))[0]
    assert watched.requires_grad
    assert torch.equal(watched.detach(), out)


def test_one_tensor_in_several_roles_sums_its_gradients(target):
    """Shared tables and self-attention on one tensor are ordinary for DeBERTa."""
    problem = inputs.problem(Case(batch=2, heads=2, nq=30, head_dim=16), target.device)
    dout = inputs.dout(Case(), problem)
    x, table = problem.q.detach().requires_grad_(), problem.pos_key.detach().requires_grad_()
    shared = replace(problem, q=x, k=x, v=x, pos_key=table, pos_query=table)
    gradients = torch.autograd.grad(target.run(shared)[0], (x, table), dout)
    apart = budget.evaluate(target.run, replace(shared, q=x.detach(), k=x.detach(), v=x.detach()), dout)
    expected = (apart["dq"] + apart["dk"] + apart["dv"], apart["dpos_key"] + apart["dpos_query"])
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_inputs_and_upstream_gradient_are_not_written_to(target):
    case = Case(batch=2, heads=2, nq=40, head_dim=16, mask="right_tokens", dropout_p=0.1)
    problem = inputs.problem(case, target.device)
    dout = inputs.dout(case, problem)
    tensors = [*(getattr(problem, name) for name in NAMES), problem.masks.key, problem.masks.query, dout]
    before = [x.clone() for x in tensors]
    budget.evaluate(target.run, problem, dout)
    for x, copy in zip(tensors, before):
        assert torch.equal(x, copy)


def test_backward_twice_over_one_graph_gives_the_same_bits(target):
    problem = inputs.problem(replace(CASE, dropout_p=0.2), target.device)
    leaf = problem.q.detach().requires_grad_()
    out = target.run(replace(problem, q=leaf))[0]
    (first,) = torch.autograd.grad(out, leaf, torch.ones_like(out), retain_graph=True)
    (second,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointing_gives_the_same_bits_with_dropout(target, reentrant):
    problem = inputs.problem(replace(CASE, dropout_p=0.2), target.device)
    dout = inputs.dout(CASE, problem)

    def forward(q):
        return target.run(replace(problem, q=q))[0]

    results = []
    for call in (forward, lambda q: torch.utils.checkpoint.checkpoint(forward, q, use_reentrant=reentrant)):
        leaf = problem.q.detach().clone().requires_grad_()
        torch.manual_seed(0)
        out = call(leaf)
        out.backward(dout)
        results.append((out.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
