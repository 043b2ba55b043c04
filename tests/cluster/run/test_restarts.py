"""How often a job may start again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.job import Job, Resources
from cluster.run.folder import RunFolder
from cluster.run.restarts import (
    MAX_LOST,
    MAX_STOPPED,
    Cause,
    Restart,
    add_restart,
    newest_checkpoint,
    read_restarts,
    spent,
)
from cluster.run.status import Failure

JOB = Job(name="test", function="a:b", arguments={}, resources=Resources(), folder=Path("run"))


def ends(*causes: Cause | str) -> list[Restart]:
    """Attempts 1, 2, ...; a word that is no cause is a checkpoint that had appeared by then."""
    restarts: list[Restart] = []
    checkpoint = None
    for cause in causes:
        if not isinstance(cause, Cause):
            checkpoint = cause
            continue
        restarts.append(
            Restart(attempt=len(restarts) + 1, cause=cause, message="boom", checkpoint=checkpoint)
        )
    return restarts


def test_preemption_is_free_for_a_job_that_saves() -> None:
    steps = [word for step in range(100) for word in (Cause.PREEMPTED, f"step-{step}")]
    assert spent(ends(*steps), JOB) is None
    assert spent(ends(*[Cause.PREEMPTED] * (MAX_STOPPED - 1)), JOB) is None
    assert spent([], JOB) is None


@pytest.mark.parametrize("cause", [Cause.CRASH, Cause.HANG])
def test_the_third_end_without_a_newer_checkpoint_is_the_last(cause: Cause) -> None:
    assert spent(ends(cause, cause), JOB) is None
    assert spent(ends(cause, cause, cause), JOB) == (
        f"3 attempts ended by {cause} without any checkpoint; the last: boom"
    )
    assert spent(ends("step-5", cause, cause, cause), JOB) == (
        f"3 attempts ended by {cause} without a checkpoint newer than step-5; the last: boom"
    )


def test_a_newer_checkpoint_gives_all_tries_back() -> None:
    crash = Cause.CRASH
    assert spent(ends(crash, crash, "step-5", crash, crash), JOB) is None
    assert spent(ends(crash, crash, "step-5", crash, crash, crash), JOB) is not None


def test_preemptions_between_crashes_give_nothing_back_and_cost_nothing() -> None:
    mixed = [Cause.CRASH, Cause.PREEMPTED, Cause.CRASH, Cause.PREEMPTED, Cause.CRASH]
    assert spent(ends(*mixed[:3]), JOB) is None
    assert spent(ends(*mixed), JOB) is not None


def test_a_job_that_takes_its_nodes_down_ends_some_day() -> None:
    assert spent(ends(*[Cause.LOST] * (MAX_LOST - 1)), JOB) is None
    assert spent(ends(*[Cause.LOST] * MAX_LOST), JOB) is not None


def test_a_new_submission_starts_with_all_tries() -> None:
    crashes = ends(*[Cause.CRASH] * 4)
    assert spent(crashes, JOB) is not None
    assert spent(crashes, JOB, since=3) is None


def test_a_job_with_one_try_ends_with_its_own_message() -> None:
    once = Job(name="t", function="a:b", arguments={}, resources=Resources(), folder=Path(), max_crashes=1)
    assert spent(ends(Cause.CRASH), once) == "boom"
    assert spent(ends(Cause.PREEMPTED), once) is None


@given(st.lists(st.sampled_from(list(Cause))))
def test_the_budget_is_never_exceeded(causes: list[Cause]) -> None:
    """Whoever asks after every end stops with at most 2 crashes and 2 hangs in the books, and the last."""
    for count in range(1, len(causes) + 1):
        if spent(ends(*causes[:count]), JOB) is not None:
            break
        assert causes[:count].count(Cause.CRASH) < 3
        assert causes[:count].count(Cause.HANG) < 3


def test_ends_are_written_down_with_the_checkpoint_of_their_time(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path)
    assert newest_checkpoint(run) is None
    add_restart(run, Restart.of(run, attempt=1, cause=Cause.PREEMPTED))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000005\n")
    failure = Failure(rank=3, type="ValueError", message="boom", node="node7")
    add_restart(run, Restart.of(run, attempt=2, cause=Cause.CRASH, failure=failure))
    first, second = read_restarts(run)
    assert (first.cause, first.checkpoint, first.rank) == (Cause.PREEMPTED, None, None)
    assert (second.message, second.rank, second.node) == ("ValueError: boom", 3, "node7")
    assert second.checkpoint == "step-00000005"
    assert second.time >= first.time > 0


def test_a_row_that_a_power_cut_has_torn_takes_no_other_along(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    first, second = ends(Cause.CRASH, Cause.LOST)
    add_restart(run, first)
    with (run.path / "restarts.jsonl").open("a") as file:
        file.write('{"attempt": 9, "cau')
    assert read_restarts(run) == [first]
    add_restart(run, second)
    assert read_restarts(run) == [first, second]
