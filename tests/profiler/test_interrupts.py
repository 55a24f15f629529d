"""Ctrl-C waits for held blocks, and the handlers of before come back."""

import os
import signal
import threading

import pytest

from moescope.profiler.interrupts import interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_held_block_is_raised_at_its_end(number: int) -> None:
    steps = []
    with interruptible() as interrupts:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - where it is raised is the question
            with interrupts.held():
                os.kill(os.getpid(), number)
                steps.append("finished")
            steps.append("not reached")
        assert steps == ["finished"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        with interrupts.held():  # the signal was raised once, not again
            steps.append("calm")
    assert steps == ["finished", "calm"]


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="inside"), interruptible():  # noqa: PT012
        assert signal.getsignal(signal.SIGINT) != before[0]
        raise ValueError("inside")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_other_threads_leave_the_handlers_alone() -> None:
    seen = []

    def work() -> None:
        with interruptible() as interrupts, interrupts.held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
