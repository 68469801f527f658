"""What each question about PyTorch's state answers in each state: a table, so that two that differ stay two."""

import pytest
import torch
from torch import nn

from deberta_kernels import ops
from deberta_kernels.checks.arguments import holds_values
from deberta_kernels.linear import hidden_dropout, layers, products
from deberta_kernels.models import adapterhub, encoder, position_tables
from deberta_kernels.models.anatomy import anatomy_of
from deberta_kernels.models.guards import allow_list
from deberta_kernels.models.guards.distances import are_ordinary
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
    "is watched": (lambda x: layers.is_watched(), WATCHED, set()),
    "is any function watched": (lambda x: layers.is_any_function_watched(), {"function mode"}, set()),
    "is traced": (lambda x: ops._traced(), {*MODES, "jit trace"}, set()),
    "is transformed": (lambda x: torch._C._functorch.peek_interpreter_stack() is not None, TRANSFORMS, set()),
    "are transforms active": (lambda x: torch._C._are_functorch_transforms_active(), TRANSFORMS, set()),
    "needs no operator": (
        lambda x: ops._unwatched((x,) + (None,) * 18),
        ALL - WATCHED - FAKE - {"default device", "meta", "profiler", "subclass"},
        set(),
    ),
    "is a plain gradient": (ops._plain_gradient, ALL - FAKE - {"parameter", "batched gradients", "subclass"}, set()),
    "holds values": (holds_values, ALL - MODES - FAKE - TRANSFORMS - {"compiling", "subclass"}, set()),
    "may be read by the encoder": (
        lambda x: encoder._readable(x, x), ALL - MODES - FAKE - {"compiling", "meta", "parameter", "subclass"}, set(),
    ),
    "is full": (
        lambda x: adapterhub._is_full(x == x),
        ALL - MODES - FAKE - {"compiling", "meta", "vmap", "batched gradients"},
        {"fake tensor", "vmap", "batched gradients"},
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
    "is mapped": (products.is_mapped, {*TRANSFORMS, *FAKE, "batched gradients", "subclass"}, set()),
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
