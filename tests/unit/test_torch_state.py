"""What each question about PyTorch's state answers in each state: a table, so that two that differ stay two."""

import pytest
import torch
from torch import nn

from deberta_kernels.linear import hidden_dropout, layers, products
from deberta_kernels.models import adapterhub, position_tables
from deberta_kernels.models.anatomy import anatomy_of
from deberta_kernels.models.guards import allow_list
from deberta_kernels.models.guards.distances import are_ordinary
from deberta_kernels.torch_state import modes, onlookers
from tests import needs
from tests.unit.torch_states import LENGTH, STATES

TRANSFORMS = {"vmap", "func.grad", "func.jvp", "functionalize"}
FAKE = {"fake mode", "fake tensor"}
MODES = {"dispatch mode", "fake mode"}
WATCHED = {*TRANSFORMS, *MODES, "jit trace", "function mode", "dual level"}
ALL = set(STATES)


class Attention(nn.Module):
    """What the questions about an attention module read of it: linear distances and one position term."""

    relative_attention, share_att_key, pos_att_type = True, True, ("c2p",)
    position_buckets, max_relative_positions, num_attention_heads = -1, 2 * LENGTH, 2

    def __init__(self):
        super().__init__()
        self.key_proj, self.pos_dropout = nn.Linear(LENGTH, LENGTH), nn.Dropout(0.1)


ATTENTION = Attention().eval().requires_grad_(False)
LINEAR = nn.Linear(LENGTH, 3).requires_grad_(False)
DROPOUT = nn.Dropout(0.5)


def keeps_tables(x):
    anatomy = anatomy_of(ATTENTION)
    spec, projections = anatomy.position_spec(ATTENTION), anatomy.position_projections(ATTENTION)
    return position_tables._validity(ATTENTION, projections, spec, x, lambda table: ("key",)) is not None


# Question -> (asked of a tensor in some state, the states in which it says yes, those in which it raises).
QUESTIONS = {
    "runs the original code": (
        lambda x: allow_list.runs_original_code(), {*TRANSFORMS, "exporting", "jit trace", "dual level"}, set(),
    ),
    "plain eager": (lambda x: modes.plain_eager(), ALL - WATCHED, set()),
    "function mode": (lambda x: modes.function_mode(), {"function mode"}, set()),
    "forward mode": (lambda x: modes.forward_mode(), {"func.jvp", "dual level"}, set()),
    "dispatch mode": (lambda x: modes.dispatch_mode(), MODES, set()),
    "traced": (lambda x: modes.traced(), {*MODES, "jit trace"}, set()),
    "transformed": (lambda x: modes.transformed(), TRANSFORMS, set()),
    "has an interpreter": (
        lambda x: torch._C._functorch.peek_interpreter_stack() is not None, TRANSFORMS, set(),
    ),
    "exporting": (lambda x: modes.exporting(), {"exporting", "jit trace"}, set()),
    "needs an operator": (
        lambda x: modes.needs_operator((x, None)),
        {*WATCHED, *FAKE, "default device", "meta", "profiler", "subclass"},
        set(),
    ),
    "values exist": (lambda x: modes.values_exist(), ALL - MODES - {"compiling"}, set()),
    "values are readable": (
        modes.values_readable, ALL - MODES - FAKE - TRANSFORMS - {"compiling", "meta", "subclass"}, set(),
    ),
    "is full": (
        lambda x: adapterhub._is_full(x == x),
        ALL - MODES - FAKE - TRANSFORMS - {"compiling", "meta", "subclass", "batched gradients"},
        {"batched gradients"},
    ),
    "holds ordinary distances": (
        lambda x: are_ordinary(x.to(torch.int64), ATTENTION, LENGTH),
        ALL - MODES - FAKE - TRANSFORMS - {"compiling", "zero tensor", "batched gradients"},
        {"fake tensor", "batched gradients"},
    ),
    "may keep tables": (
        keeps_tables,
        ALL - MODES - {"compiling", "parameter", "func.grad", "func.jvp"},
        {"func.jvp"},
    ),
    "is mapped": (modes.is_mapped, {*TRANSFORMS, *FAKE, "batched gradients", "subclass"}, set()),
    "has memory for products": (
        products._is_plain,
        ALL - TRANSFORMS - FAKE - {"batched gradients", "meta", "subclass", "zero tensor"},
        set(),
    ),
    "has memory for dropout": (
        hidden_dropout._is_supported, ALL - FAKE - {"meta", "parameter", "subclass", "zero tensor"}, set(),
    ),
    "takes a linear layer over": (
        lambda x: layers._is_plain(LINEAR, x),
        {"eager", "no_grad", "inference", "autocast", "exporting", "default device", "batched gradients", "profiler"},
        set(),
    ),
    "takes a dropout over": (
        lambda x: hidden_dropout._is_plain(DROPOUT, x, None),
        {"eager", "no_grad", "inference", "autocast", "exporting", "default device", "batched gradients", "profiler"},
        set(),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer(question, state):
    ask, yes, raising = QUESTIONS[question]
    if question == "takes a dropout over":
        needs.native_library()

    def probe(x):
        try:
            return bool(ask(x))
        except (AssertionError, RuntimeError) as error:
            return error

    answer = STATES[state](probe)
    if state in raising:
        assert isinstance(answer, Exception)
    else:
        assert answer is (state in yes)


def weight_norm(module):
    torch.nn.utils.weight_norm(module)  # a hook that computes a weight, and looks at nothing


def own_forward(module):
    module.forward = lambda x: x


def for_all(module):
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


# What was done to a linear layer -> which of has_forward_hooks, has_hooks, is_watched and sees_every_call say yes.
HOOKS = {
    "nothing": (lambda module: None, ""),
    "forward hook": (lambda module: module.register_forward_hook(lambda *_: None), "forward any watched"),
    "pre-hook": (lambda module: module.register_forward_pre_hook(lambda *_: None), "forward any watched"),
    "backward hook": (lambda module: module.register_full_backward_hook(lambda *_: None), "any watched"),
    "hook of all modules": (for_all, "any all"),
    "weight norm": (weight_norm, "forward any"),
    "compiled": (lambda module: module.compile(backend="eager"), "any"),
    "own forward": (own_forward, "any watched"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", HOOKS)
def test_who_looks_at_a_module(what):
    do, yes = HOOKS[what]
    module = nn.Linear(LENGTH, 3)
    handle = do(module)
    try:
        answers = {
            "forward": onlookers.has_forward_hooks(module),
            "any": onlookers.has_hooks(module),
            "watched": onlookers.is_watched(module),
            "all": onlookers.sees_every_call() is not None,
        }
        assert onlookers.are_instances_watched([nn.Linear(1, 1), None, module]) == answers["watched"]
    finally:
        if what == "hook of all modules":
            handle.remove()
    assert answers == {name: name in yes.split() for name in answers}
