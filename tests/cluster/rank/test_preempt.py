"""The flag that signals set."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from cluster.rank import preempt
from cluster.rank.preempt import PreemptionFlag
from cluster.run.folder import RunFolder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with PreemptionFlag(RunFolder(tmp_path)) as flag:
        assert not flag.requested
        os.kill(os.getpid(), number)
        assert flag.requested
        os.kill(os.getpid(), number)  # impatience changes nothing
    assert signal.getsignal(number) == before


def test_it_takes_over_from_a_handler_that_was_there_first_and_gives_it_back(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with PreemptionFlag(RunFolder(tmp_path)) as flag:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert flag.requested
            assert heard == []
        os.kill(os.getpid(), signal.SIGUSR2)
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_sees_a_request_whose_signal_was_lost(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SLURM loses it while a job is suspended or being resumed."""
    monkeypatch.setattr(preempt, "SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setenv("RANK", str(rank))
    run = RunFolder(tmp_path)
    with PreemptionFlag(run) as flag:
        assert not flag.requested
        run.request_cancel()
        time.sleep(0.1)
        assert flag.requested == (rank == 0)
        run.clear_cancel()
        assert flag.requested == (rank == 0)  # it stays a request
