"""The operators: schemas, fake kernels, autograd, and the short way past the dispatcher in plain eager mode.

Two routes lead to the same backend. Whenever anything watches tensors (compile, fake tensors, dispatch modes,
functorch, profilers, tensor subclasses) the call goes through `torch.ops.deberta_kernels.attention`. In plain eager
mode it goes straight to the backend, through a `torch.autograd.Function` if a gradient is needed: the operator's own
autograd costs about 100 microseconds a call, this one about 10.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deberta_kernels import __name__ as PACKAGE
from deberta_kernels import dispatch, flops
from deberta_kernels.backends import REGISTRY, Backend
from deberta_kernels.checks.operands import check_gradients, check_problem, check_reachable_rows, check_storages
from deberta_kernels.dropout import draw_seed
from deberta_kernels.notices import count_call
from deberta_kernels.torch_state.modes import (
    dispatch_mode,
    forward_mode,
    is_mapped,
    needs_operator,
    traced,
    transformed,
)
from deberta_kernels.types import ARGUMENTS, AttentionProblem, Gradients

__all__ = ["attention"]

_PROBLEM = ", ".join([*(f"{kind} {name}" for name, kind in ARGUMENTS), "str backend"])
_TENSORS = sum(kind.startswith("Tensor") for _, kind in ARGUMENTS)  # they come first
_BOUNDS = [name for name, _ in ARGUMENTS].index("cu_seqlens")
# A copy of this package under another name has operators of its own.
_OPERATORS = getattr(torch.ops, PACKAGE)
_problem = AttentionProblem.of_arguments
_DIFFERENTIABLE = 5  # q, k, v, pos_key, pos_query
_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_AUTOGRAD = _VIEW_TRACKING | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
_NO_SECOND_DERIVATIVE = (
    "the second derivative of disentangled attention is supported by backend='reference' only; pass "
    "backend='reference' for double backward (gradient penalties, Hessians)."
)
_NO_TANGENTS = (
    "forward-mode differentiation of disentangled attention (torch.func.jvp, forward_ad) is supported by "
    "backend='reference' only; pass backend='reference', or use reverse mode."
)
_NO_VMAP = (
    "torch.vmap over disentangled attention is supported by backend='reference' only; fold the mapped dimension into "
    "the batch, or pass backend='reference'."
)


torch.library.define(f"{PACKAGE}::attention", f"({_PROBLEM}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(
    f"{PACKAGE}::attention_backward",
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_PROBLEM}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attention(problem: AttentionProblem, backend: str, *, strict: bool = False) -> tuple[Tensor, Tensor]:
    """Compute disentangled attention, differentiably.

    Args:
        problem: the call, validated; where probabilities are dropped, a seed is drawn unless it has one.
        backend: as in `dispatch.choose`. Compiled code chooses when it runs, so that nothing of the choice is traced.
        strict: as in `dispatch.choose`; compiled code only warns.

    Returns:
        out: (B, H, Nq, D) over memory laid out (B, Nq, H, D), dtype of q.
        lse: (B, H, Nq), natural log of the sum of exp(score) over the keys allowed; float32, float64 for float64.

    Raises:
        NotImplementedError: the backend cannot run this call; forward-mode differentiation or vmap with a backend other
            than "reference".
    """
    compiling = torch.compiler.is_compiling()
    if compiling:
        dispatch.check_backend(backend)
    else:
        # Before the seed is drawn: a call that is refused leaves torch's generator as it was.
        backend = dispatch.choose(problem, backend, strict=strict)
    if problem.dropout_p > 0.0 and problem.seed is None and problem.q.numel() > 0:
        problem = problem.changed(seed=draw_seed(problem.q.device))
    if compiling:
        return _OPERATORS.attention(*problem.arguments(), backend)  # type: ignore[no-any-return]
    tensors = problem.tensors()
    if needs_operator(tensors):
        return _watched(problem, backend)
    if torch.is_grad_enabled() and not REGISTRY[backend].own_graph:
        for x in tensors[:_DIFFERENTIABLE]:
            if x is not None and x.requires_grad:
                settings = (*problem.arguments()[_TENSORS:], backend)
                return _EagerAttention.apply(*tensors, settings)  # type: ignore[no-any-return]
    return _run_forward(problem, backend)


def _watched(problem: AttentionProblem, backend: str) -> tuple[Tensor, Tensor]:
    """Compute it where somebody may need to see an operator."""
    if dispatch_mode():
        flops.register()
    if REGISTRY[backend].own_graph and not traced() and not problem.q.is_meta:
        return _run_forward(problem, backend)
    arguments = (*problem.arguments(), backend)
    _refuse_tangents(arguments)
    arguments = _with_own_bounds(arguments)  # before the forward runs; in eager mode they are a copy already
    if transformed() and not traced():
        return _FunctionalAttention.apply(*arguments)  # type: ignore[no-any-return]
    return _OPERATORS.attention(*arguments)  # type: ignore[no-any-return]


def _refuse_tangents(arguments: tuple[Any, ...]) -> None:
    """Raise for forward-mode differentiation, which would otherwise lose the tangents without a word."""
    if not forward_mode():
        return
    for x in arguments[:_DIFFERENTIABLE]:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(_NO_TANGENTS)


def _run_forward(problem: AttentionProblem, backend: str) -> tuple[Tensor, Tensor]:
    """Compute the forward with the backend itself, outside autocast: it owns its precision."""
    row, module = REGISTRY[backend], dispatch.load(backend)
    if row.direct and problem.q.numel() and not torch._C._is_any_autocast_enabled():
        result: tuple[Tensor, Tensor] = module.forward(problem)
    else:
        check_storages(problem)
        if problem.q.numel() == 0 and not row.own_graph:  # which there is without values as well
            return _empty_outputs(problem.q)
        check_reachable_rows(problem)
        result = _run_apart(module.attention if row.own_graph else module.forward, problem, row)
    count_call(backend)
    return result


def _run_apart(compute: Callable[[AttentionProblem], Any], problem: AttentionProblem, row: Backend) -> Any:
    if torch._C._is_any_autocast_enabled():
        with torch.autocast(problem.q.device.type, enabled=False):
            return _run_below(compute, problem, row)
    return _run_below(compute, problem, row)


def _run_below(compute: Callable[[AttentionProblem], Any], problem: AttentionProblem, row: Backend) -> Any:
    if row.own_graph:
        return compute(problem)
    # Below autograd and view tracking: `out` is then a plain result that may be modified in place like that of any
    # operator, not a view that autograd remembers as made in no_grad mode.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return compute(problem)


def _run_backward(
    problem: AttentionProblem,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    backend: str,
    needs: tuple[bool, ...],
) -> Gradients:
    """Compute the gradients asked for with the backend itself, outside autocast."""
    problem = check_problem(problem, real=True)  # what was saved may have changed since
    check_gradients(problem, dout, dlse, out, lse, needs)
    check_storages(problem)
    inputs = (problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query)
    if problem.q.numel() == 0:
        pairs = zip(inputs, needs, strict=True)
        return Gradients(*(torch.zeros_like(x) if need and x is not None else None for x, need in pairs))
    check_reachable_rows(problem)
    backend = dispatch.choose(problem, backend, backward=True)
    backward, problem = dispatch.backward_of(backend, problem)
    with ExitStack() as stack:
        if torch._C._is_any_autocast_enabled():
            stack.enter_context(torch.autocast(problem.q.device.type, enabled=False))
        if REGISTRY[backend].own_graph:
            # Its backward is autograd's, and an operator runs with autograd taken out of the dispatch.
            excluded = torch._C._dispatch_tls_local_exclude_set() - _AUTOGRAD
            stack.enter_context(torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded))
        return backward(problem, dout, dlse, out, lse, needs)  # type: ignore[no-any-return]


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, nq, head_dim = q.shape
    out = q.new_empty(batch, nq, heads, head_dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, nq, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return out, lse


def _op_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    # Compiled code comes here with the name the caller gave and with bounds nobody has read: what refuses, refuses now.
    problem = check_problem(_problem(arguments), real=True)
    with torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING):
        out, lse = _run_forward(problem, dispatch.choose(problem, arguments[-1]))
        return _heads_inside(out), lse.contiguous()


def _op_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, needs = rest
    gradients = _run_backward(_problem(tuple(arguments)), dout, dlse, out, lse, arguments[-1], tuple(needs))
    found = [None if g is None else _heads_inside(g) if i < 3 else g.contiguous() for i, g in enumerate(gradients)]
    return tuple(dout.new_empty(0) if g is None else g for g in found)


def _heads_inside(x: Tensor) -> Tensor:
    """Return (B, H, N, D) values in (B, N, H, D) memory: the one layout that the fake kernels promise."""
    _, heads, length, head_dim = x.shape
    if x.stride() == (length * heads * head_dim, head_dim, heads * head_dim, 1):
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check_shapes(arguments)
    return _empty_outputs(arguments[0])


def _check_shapes(arguments: tuple[Any, ...], *results: Any) -> None:
    """Check what is known of tensors without values."""
    try:
        problem = check_problem(_problem(arguments), real=False)
        if results:
            check_gradients(problem, *results)
    except NotImplementedError:
        raise
    except RuntimeError:
        return  # a comparison of sizes that only exist at run time, where the operator checks them


def _fake_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    _check_shapes(rest[:-1], dout, dlse, out, lse, needs)
    found = []
    for index, x in enumerate(rest[:_DIFFERENTIABLE]):
        if x is None or not needs[index]:
            found.append(dout.new_empty(0))
        elif index < 3:
            batch, heads, length, head_dim = x.shape
            found.append(x.new_empty(batch, length, heads, head_dim).transpose(1, 2))
        else:
            found.append(x.new_empty(x.shape))
    return tuple(found)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    if any(ctx.needs_input_grad[:_DIFFERENTIABLE]):
        ctx.save_for_backward(*inputs[:_TENSORS], *output)
        ctx.settings = inputs[_TENSORS:]


def _save_of_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, _with_own_bounds(inputs), output)


def _with_own_bounds(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    # NumPy can change the caller's without a trace; the gradients belong to the bounds of the forward.
    bounds = arguments[_BOUNDS]
    return arguments if bounds is None else (*arguments[:_BOUNDS], bounds.clone(), *arguments[_BOUNDS + 1 :])


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:_DIFFERENTIABLE]]
    nothing = (None,) * (len(ctx.needs_input_grad) - _DIFFERENTIABLE)
    if not any(needs) or (dout is None and dlse is None):
        return (*[None] * _DIFFERENTIABLE, *nothing)
    *tensors, out, lse = ctx.saved_tensors
    arguments = (*tensors, *ctx.settings)
    if dout is None or dout._is_zerotensor():
        dout = torch.zeros_like(out)
    dlse = None if dlse is None or dlse._is_zerotensor() else dlse
    # With create_graph the operator is needed: its own autograd refuses a second derivative by name.
    watched = torch.compiler.is_compiling() or torch.is_grad_enabled() or needs_operator(arguments[:_TENSORS])
    if watched or any(x is not None and is_mapped(x) for x in (dout, dlse)):
        functional = transformed() and not traced()
        compute = _FunctionalBackward.apply if functional else _OPERATORS.attention_backward
        gradients = compute(dout, dlse, out, lse, *arguments, needs)
        return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *nothing
    with torch._C._AutoDispatchBelowAutograd():
        found = _run_backward(_problem(arguments), dout, dlse, out, lse, arguments[-1], tuple(needs))
    return *found, *nothing


class _EagerAttention(torch.autograd.Function):
    """A plain eager call that is differentiated: the operator's formulas without its dispatch."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        arguments = (*given[:_TENSORS], *given[_TENSORS])  # the latter in one, since each takes time of its own
        output = _run_forward(_problem(arguments), arguments[-1])
        _save(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        return _differentiate(ctx, dout, dlse)


class _FunctionalAttention(torch.autograd.Function):
    """A call inside torch.func transforms, which accept no operator with Python autograd."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _run_forward(_problem(arguments), arguments[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        return _differentiate(ctx, dout, dlse)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(_NO_TANGENTS)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
        raise NotImplementedError(_NO_VMAP)


class _FunctionalBackward(torch.autograd.Function):
    """The gradients of such a call, which refuse to be transformed again."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _OPERATORS.attention_backward(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(_NO_TANGENTS)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
        raise NotImplementedError(_NO_VMAP)


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(_NO_SECOND_DERIVATIVE)


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    raise NotImplementedError(_NO_VMAP)


torch.library.impl(f"{PACKAGE}::attention", "CompositeExplicitAutograd", _op_forward)
torch.library.impl(f"{PACKAGE}::attention_backward", "CompositeExplicitAutograd", _op_backward)
torch.library.register_fake(f"{PACKAGE}::attention", _fake_forward)
torch.library.register_fake(f"{PACKAGE}::attention_backward", _fake_backward)
torch.library.register_autograd(f"{PACKAGE}::attention", _differentiate, setup_context=_save_of_operator)
torch.library.register_autograd(f"{PACKAGE}::attention_backward", _refuse_second_derivative)
torch.library.register_vmap(f"{PACKAGE}::attention", _refuse_vmap)
torch.library.register_vmap(f"{PACKAGE}::attention_backward", _refuse_vmap)
flops.register()
