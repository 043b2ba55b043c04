"""The flag that signals set."""

from __future__ import annotations

import os
import signal

import pytest

from cluster.rank.preempt import PreemptionFlag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with PreemptionFlag() as flag:
        assert not flag.requested
        os.kill(os.getpid(), number)
        assert flag.requested
        os.kill(os.getpid(), number)  # impatience changes nothing
    assert signal.getsignal(number) == before


def test_it_takes_over_from_a_handler_that_was_there_first_and_gives_it_back() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with PreemptionFlag() as flag:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert flag.requested
            assert heard == []
        os.kill(os.getpid(), signal.SIGUSR2)
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)
