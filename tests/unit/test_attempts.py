"""How long a failure to compile or load is believed."""

import errno
import os
import signal
import subprocess
import threading

import pytest
import torch

from deberta_kernels.impl.attempts import Attempts, FailedError, LastingError, cause_of, is_passing


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self):
        return self.now


class Maker:
    """What takes a time and fails with one error after the other, then succeeds."""

    def __init__(self, clock, seconds, *errors):
        self.clock, self.seconds, self.errors, self.calls = clock, seconds, list(errors), 0

    def __call__(self):
        self.calls += 1
        self.clock.now += self.seconds
        if self.errors:
            raise self.errors.pop(0)
        return "made"


def full_disk():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/tmp3x9.ptx")


def refused(attempts, make):
    with pytest.raises(FailedError) as caught:
        attempts.get("key", make)
    return caught.value


def test_what_was_made_is_made_once():
    clock = Clock()
    attempts, make = Attempts(clock), Maker(clock, 1.0)
    assert [attempts.get("key", make) for _ in range(3)] == ["made"] * 3
    assert make.calls == 1


def test_after_a_full_disk_the_next_call_tries_again():
    clock = Clock()
    attempts, make = Attempts(clock), Maker(clock, 10.0, full_disk())
    assert refused(attempts, make).passing
    assert attempts.get("key", make) == "made"


def test_attempts_that_may_succeed_take_a_tenth_of_the_time_at_most():
    clock = Clock()
    attempts, make = Attempts(clock), Maker(clock, 10.0, *[full_disk() for _ in range(10_000)])
    start = clock.now
    while clock.now < start + 10_000:
        refused(attempts, make)
        clock.now += 1.0
    assert 80 <= make.calls <= 2 + 10_000 / 100
    make.errors.clear()
    clock.now += 100
    assert attempts.get("key", make) == "made"


def test_a_compiler_that_fails_is_hardly_ever_asked_again():
    clock = Clock()
    attempts, make = Attempts(clock), Maker(clock, 10.0, *[RuntimeError("PassManager::run failed")] * 99)
    start = clock.now
    while clock.now < start + 50_000:
        assert str(refused(attempts, make)) == "PassManager::run failed"
        clock.now += 10.0
    assert make.calls == 2


def test_what_lies_in_the_device_is_never_tried_again():
    clock = Clock()
    attempts, make = Attempts(clock), Maker(clock, 0.0, LastingError("too little shared memory"))
    for _ in range(3):
        assert not refused(attempts, make).passing
        clock.now += 1e9
    assert make.calls == 1


def test_a_later_reason_replaces_the_passing_one():
    clock = Clock()
    attempts, make = Attempts(clock), Maker(clock, 1.0, full_disk(), RuntimeError("ptxas died"))
    assert refused(attempts, make).passing
    for _ in range(2):
        found = refused(attempts, make)
        assert (str(found), found.passing) == ("ptxas died", False)


def test_an_interruption_passes_through_and_is_forgotten():
    clock = Clock()
    attempts, make = Attempts(clock), Maker(clock, 1.0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        attempts.get("key", make)
    assert attempts.get("key", make) == "made"


@pytest.mark.parametrize("failures", [0, 1])
def test_threads_wait_for_the_one_that_makes_it(failures):
    attempts, gate, found, calls = Attempts(), threading.Event(), [], []

    def make():
        calls.append(threading.get_ident())
        gate.wait(10)
        if len(calls) <= failures:
            raise full_disk()
        return "made"

    def ask():
        try:
            found.append(attempts.get("key", make))
        except FailedError:
            found.append("failed")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(10)
    assert sorted(found) == ["failed"] * failures + ["made"] * (4 - failures)
    assert len(calls) == 1 + failures


def killed(status):
    """As Triton reports a compiler that was ended: an error of its own, raised while handling that of the process."""
    try:
        try:
            raise subprocess.CalledProcessError(status, ["ptxas"])
        except subprocess.CalledProcessError:
            raise RuntimeError("PTXAS error: `ptxas` failed")  # noqa: B904  (so does Triton)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (full_disk(), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (OSError("libcuda.so.1: cannot open shared object file"), False),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (killed(-signal.SIGKILL), True),
        (killed(128 + signal.SIGTERM), True),
        (killed(-signal.SIGSEGV), False),
        (killed(255), False),
        (killed(1), False),
        (ValueError("no"), False),
        (FailedError("no", passing=True), True),
    ],
    ids=repr,
)
def test_passing_is_what_lies_around_the_attempt(error, passing):
    assert is_passing(error) is passing


def test_causes_name_no_file_of_one_process():
    assert cause_of(full_disk()) == "OSError: No space left on device"
    assert cause_of(killed(-9)) == "the compiler was ended by signal 9"
    assert cause_of(RuntimeError("first\nptxas died\nRepro command: ptxas /tmp/x.ptx\n")) == "RuntimeError: ptxas died"
    assert cause_of(MemoryError()) == "MemoryError: "
