"""CUDA graphs: what a capture cannot do is refused by name, and what is kept on a device is no graph's."""

import gc
import threading
import weakref
from unittest import mock

import pytest
import torch

from deberta_kernels import dispatch
from deberta_kernels.impl import common, cuda, torch_tiled
from deberta_kernels.impl.cuda.arguments import rows_of_distances
from deberta_kernels.impl.triton import tables
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.torch_state import captures
from deberta_kernels.torch_state.captures import CaptureError, check_not_capturing, kept_on_device
from deberta_kernels.types import PositionSpec

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capture(monkeypatch):
    """Say whether a graph is being captured; none is at first."""
    state = mock.Mock(return_value=False)
    monkeypatch.setattr(captures, "capturing", state)

    def switch(on):
        state.return_value = on

    return switch


class Thing:
    """What can be kept, and watched."""


@pytest.fixture
def made():
    """What `thing` has made: arguments, the thread, inference mode."""
    return []


@pytest.fixture
def thing(made):
    @kept_on_device(2)
    def thing(device, number):
        made.append((device, number, threading.get_ident(), torch.is_inference_mode_enabled()))
        return Thing()

    return thing


def test_what_is_kept_is_made_once_in_a_thread_of_its_own(thing, made):
    with torch.inference_mode():
        first = thing(CPU, 1)
    assert thing(CPU, 1) is first
    [(device, number, thread, inference)] = made
    assert (device, number, inference) == (CPU, 1, False)
    assert thread != threading.get_ident()


def test_a_tensor_made_under_a_default_device_is_where_it_should_be():
    @kept_on_device(1)
    def numbers(device):
        return torch.arange(3)

    with torch.device("meta"):
        assert numbers(CPU).tolist() == [0, 1, 2]


def test_what_fails_to_be_made_raises_where_it_was_asked_for_and_is_tried_again():
    @kept_on_device(1)
    def unlucky(device, answers):
        answer = answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return answer

    class Answers(list):
        __hash__ = object.__hash__

    answers = Answers([5, MemoryError("full")])
    with pytest.raises(MemoryError, match="full"):
        unlucky(CPU, answers)
    assert unlucky(CPU, answers) == 5


def test_nothing_is_put_on_a_device_during_a_capture_and_the_next_call_does_it(capture, thing, made):
    capture(True)
    with pytest.raises(CaptureError, match=r"captured on cuda:0.* has to put thing on the device.* before the capture"):
        thing(GPU, 1)
    assert made == []
    capture(False)
    found = thing(GPU, 1)
    capture(True)
    assert thing(GPU, 1) is found


def test_the_oldest_makes_room_when_its_device_has_finished(capture, thing, made):
    first = weakref.ref(thing(GPU, 1))
    thing(GPU, 2)
    with mock.patch.object(torch.cuda, "synchronize") as finished:
        thing(GPU, 3)
    finished.assert_called_once_with(GPU)
    gc.collect()
    assert first() is None
    thing(GPU, 3)
    assert [number for _, number, *_ in made] == [1, 2, 3]


def test_what_a_captured_graph_reads_never_makes_room(capture, thing, made):
    thing(GPU, 1)
    capture(True)
    first = weakref.ref(thing(GPU, 1))
    capture(False)
    with mock.patch.object(torch.cuda, "synchronize"):
        for number in range(2, 6):
            thing(GPU, number)
    gc.collect()
    assert first() is not None
    assert thing(GPU, 1) is first()


def test_only_the_stream_of_the_device_itself_counts(monkeypatch):
    asked = []
    assert not captures.capturing(GPU)  # PyTorch has not opened a device
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: asked[-1])
    monkeypatch.setattr(torch.cuda, "device", lambda device: mock.MagicMock(__enter__=lambda _: asked.append(device)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked[-1] != 0)
    asked.append(0)
    assert not captures.capturing(CPU)
    assert not captures.capturing(GPU)
    assert captures.capturing(torch.device("cuda", 1))
    assert asked == [0, torch.device("cuda", 1)]


def test_work_that_a_capture_cannot_do_is_allowed_elsewhere():
    check_not_capturing(CPU, "compile")


SETTING = PositionSpec(11, 77)  # no other test has it


@pytest.mark.parametrize(
    "ask",
    [
        lambda device: tables.device_tables(5, SETTING, device).delta,
        lambda device: rows_of_distances(device, SETTING, -9, 9, 22),
        lambda device: torch_tiled._row_on_device(device, 5, 6, 11, 77),
    ],
    ids=["triton", "cuda", "torch"],
)
def test_the_tables_of_every_backend_are_kept_and_not_made_during_a_capture(capture, ask):
    device = torch.device("meta")
    capture(True)
    with pytest.raises(CaptureError, match=r"put .* on the device"):
        ask(device)
    capture(False)
    with torch.inference_mode():
        found = ask(device)
    assert found.device == device
    assert not found.is_inference()
    capture(True)
    assert ask(device) is found


def test_a_first_call_of_the_cuda_kernels_during_a_capture_says_what_to_do(capture, monkeypatch):
    monkeypatch.setattr(cuda, "_ordinal", lambda device: 5)
    monkeypatch.setattr(cuda, "device_refusal", lambda *_: None)
    opened = mock.Mock(side_effect=cuda.driver.DriverError("there is no driver"))
    monkeypatch.setattr(cuda.driver, "driver", opened)
    problem = inputs.problem(Case(nq=4, head_dim=64, dtype=torch.bfloat16))
    capture(True)
    with pytest.raises(CaptureError, match="load the CUDA kernels"):
        dispatch.choose(problem, "cuda")
    opened.assert_not_called()
    capture(False)
    with pytest.raises(NotImplementedError, match="there is no driver"):  # tried anew
        dispatch.choose(problem, "cuda")


def test_packed_sequences_are_not_read_during_a_capture(capture):
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    capture(True)
    assert common.sequences(bounds) == [slice(0, 3), slice(3, 5)]
    with pytest.raises(CaptureError, match=r"reads the values of cu_seqlens.* pass backend='triton'"):
        common.sequences(bounds.to("meta"))
