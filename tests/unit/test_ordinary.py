"""The short cut through the checks: it takes the usual calls, and nothing that the checks themselves would refuse."""

import pytest
import torch

from deberta_kernels.checks import arguments
from deberta_kernels.checks.ordinary import is_ordinary
from deberta_kernels.types import Masks, PositionSpec

B, H, NQ, NK, D, SPAN = 2, 3, 5, 7, 4, 8


def ones(*shape, **more):
    return torch.ones(shape, **more)


def call(**changes):
    usual = {
        "q": ones(B, H, NQ, D), "k": ones(B, H, NK, D), "v": ones(B, H, NK, D), "pos_key": ones(H, 2 * SPAN, D),
        "pos_query": ones(H, 2 * SPAN, D), "masks": Masks(), "position": PositionSpec(SPAN, 16), "packed": False,
    }  # fmt: skip
    return usual | changes


def mask(*shape, **more):
    return ones(*shape, dtype=torch.bool, **more)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pos_key": None},
        {"pos_key": None, "pos_query": None},
        {"packed": True},
        {"pos_key": ones(H, 5, D), "pos_query": ones(H, 5, D), "position": PositionSpec(SPAN, 16, 11, NK)},
        {"position": PositionSpec(-1, SPAN)},
        {"masks": Masks(mask(B, NK), mask(B, NQ), mask(B, 1, NQ, NK))},
        {"masks": Masks(pair=mask(B, H, NQ, NK))},
        {"q": ones(B, NQ, H, D).transpose(1, 2)},
        {name: ones(*x.shape, device="meta") for name, x in call().items() if isinstance(x, torch.Tensor)},
        {name: x.bfloat16() for name, x in call().items() if isinstance(x, torch.Tensor)},
    ],
)
def test_usual_calls_take_it(changes):
    assert is_ordinary(**call(**changes))


def nested(*_):
    return torch.nested.nested_tensor([ones(H, NQ, D), ones(H, NQ + 1, D)])


@pytest.mark.parametrize("name", ["q", "k", "v", "pos_key", "pos_query"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.int(),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.tolist(),
        nested,
        lambda x: x[..., :-1],
        lambda x: x[..., :0],
        lambda x: x[:-1],
        lambda x: x[None],
        lambda x: x[0],
        lambda x: torch.cat([x, x], dim=-2),
    ],
)
def test_what_it_takes_passes_the_checks(name, change, monkeypatch):
    changed = call(**{name: change(call()[name])})
    if is_ordinary(**changed):
        monkeypatch.setattr(arguments, "is_ordinary", lambda *given: False)
        arguments.check_call(**changed)
    else:
        with pytest.raises((ValueError, TypeError)):
            arguments.check_call(**changed)


@pytest.mark.parametrize(
    "changes",
    [
        {"q": None},
        {"k": None},
        {"v": None},
        {"k": ones(B, H, 0, D), "v": ones(B, H, 0, D)},
        {"masks": Masks(key=mask(B, NQ))},
        {"masks": Masks(key=mask(B, NK, device="meta"))},
        {"masks": Masks(key=ones(B, NK))},
        {"masks": Masks(key=mask(B, NK).to_sparse())},
        {"masks": Masks(query=mask(B, NK))},
        {"masks": Masks(mask(B, NK), mask(B, NK))},
        {"masks": Masks(pair=mask(B, 2, NQ, NK))},
        {"masks": Masks(pair=mask(NQ, NK))},
        {"masks": Masks(key=mask(B, NK)), "packed": True},
        {"position": PositionSpec(1, 16)},
        {"position": PositionSpec(True, 16)},
        {"position": PositionSpec(0, 0)},
        {"position": PositionSpec(2**30 + 1, 16)},
        {"position": PositionSpec(-1, 2**30 + 1)},
        {"position": PositionSpec(SPAN, 16, 0, -1)},
        {"position": PositionSpec(SPAN, 16, 0, NK + 1)},
        {"position": PositionSpec(SPAN, 16, 0, 1.0)},
        {"position": PositionSpec(SPAN, 16, 1)},
        {"position": PositionSpec(SPAN, 16, -1)},
        {"position": PositionSpec(SPAN - 1, 16)},
        {"pos_query": ones(H, 2 * SPAN - 1, D)},
    ],
)
def test_what_the_checks_refuse_does_not_take_it(changes):
    assert not is_ordinary(**call(**changes))
    with pytest.raises((ValueError, TypeError)):
        arguments.check_call(**call(**changes))
