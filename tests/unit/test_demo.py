"""What the demo measures and shows."""

import re
import subprocess
import sys

import pytest
import torch

from deberta_kernels.demo import measure, report, runner, text


def row(**values):
    fields = {
        "label": "8 texts, one long (512)", "batch": 8, "tokens": 512, "seconds_before": 2.6, "seconds_after": 0.2,
        "cpu_before": 2.6, "cpu_after": 0.2, "bytes_before": 400_000_000, "bytes_after": 100_000_000,
        "difference": 1e-6, "scale": 5.0, "backend": "cpu",
    }  # fmt: skip
    return report.Row(**{**fields, **values})


def test_of_a_batch_of_eight_texts_one_is_long():
    ids, mask = text.ragged_batch(text.hashing_encoder(1000), 8, 512)
    assert ids.shape == mask.shape == (8, 512)
    lengths = mask.sum(1)
    assert lengths[-1] == 512
    assert lengths[:-1].max() < 40
    assert len({tuple(x[:9].tolist()) for x in ids}) == 8
    assert torch.equal(mask.bool(), torch.arange(512) < lengths[:, None])
    assert torch.equal(ids[-1:], text.single(text.hashing_encoder(1000), 512)[0])
    assert (ids[mask == 0] == text.PAD).all()


def test_short_inputs_cut_every_text():
    ids, mask = text.ragged_batch(text.hashing_encoder(1000), 4, 9)
    assert ids.shape == (4, 9)
    assert (mask.sum(1) == 9).all()


def test_the_title_says_how_much_faster():
    assert report.title([row(), row(seconds_after=1.0)]) == "A patched DeBERTa is 2.6 to 13.0 times as fast"
    assert report.title([row()]) == "A patched DeBERTa is 13.0 times as fast"


def test_conditions_name_the_processor_as_people_do(monkeypatch):
    monkeypatch.setattr(
        report.processor, "described", lambda: {"model name": "AMD EPYC", "cpu family": "25", "model": "17"}
    )
    said = report.described(report.conditions("some model", torch.float32, 1))
    assert said.startswith("some model, float32; AMD EPYC 9004 (Zen 4), 1 core; torch ")


def test_numbers_of_the_processor_are_kept(tmp_path):
    paths = report.write_numbers(tmp_path / "new", "demo", {}, [row()])
    assert [path.name for path in paths] == ["demo.json", "demo.csv"]
    assert "cpu_before" in paths[1].read_text().splitlines()[0]


# The parent interrupts itself and its child as a terminal does: at once after the fork, or when the child is at work.
INTERRUPTED = """
import os, signal, sys, time
from deberta_kernels.demo import measure

os.setpgrp()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
fork = os.fork

def fork_and_interrupt():
    child = fork()
    if child == 0:
        time.sleep(0.3)  # the signal comes before anything else is done here
    else:
        print(child, flush=True)
        time.sleep(0.1)
        os.killpg(0, signal.SIGINT)
    return child

def work():
    if sys.argv[1] == "at work":
        os.kill(os.getppid(), signal.SIGINT)
    print("begun", flush=True)
    time.sleep(60)

if sys.argv[1] == "fork":
    os.fork = fork_and_interrupt
try:
    measure.in_child(work, threads=1)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.skipif(not measure.can_measure(), reason="there is no fork, or no /proc")
@pytest.mark.parametrize(("when", "said"), [("fork", r"\d+\ninterrupted\n"), ("at work", "(begun\n?)?interrupted\n")])
def test_an_interrupt_ends_both_processes_without_a_word(when, said):
    command = [sys.executable, "-c", INTERRUPTED, when]
    # communicate() ends when the last process that holds the pipe does: a child that goes on runs into the limit.
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.stderr == ""
    assert re.fullmatch(said, done.stdout)


@pytest.mark.skipif(not measure.can_measure(), reason="there is no fork, or no /proc")
def test_an_answer_that_is_no_json_is_an_error_of_the_work():
    with pytest.raises(measure.MeasurementError, match="not JSON serializable"):
        measure.in_child(lambda: {"answer": object()}, threads=1)


def test_the_time_left_is_that_of_the_cases_to_come():
    def case(tokens: int) -> measure.Case:
        return measure.Case(f"1 x {tokens}", torch.ones(1, tokens, dtype=torch.int64), torch.ones(1, tokens))

    found, done = row(seconds_before=1.5, seconds_after=0.5), case(1000)
    assert runner._seconds_left(found, done, [], quick=False) == 0
    # A pair takes 2 s: three of them, and as many as begin in 6 s.
    assert runner._seconds_left(found, done, [case(1000)], quick=False) == pytest.approx(3 * 2 + 6 + 2)
    # Twice the tokens take three times as long: three pairs, and two at least.
    assert runner._seconds_left(found, done, [case(2000)], quick=False) == pytest.approx(5 * 6)
    # A short one reaches its 15 pairs before its 6 s.
    pair = 2 * 10 * 1010 / (1000 * 2000)
    assert runner._seconds_left(found, done, [case(10)], quick=False) == pytest.approx(18 * pair)
