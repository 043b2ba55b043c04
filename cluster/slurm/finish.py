"""An attempt on SLURM has ended: the run starts again, or ends here.

To start again comes first, and the books follow as far as the disk lets them: it may be what the ranks have
failed of.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.notify import notify
from cluster.run.restarts import Restart, add_restart, last_attempt, read_restarts, spent
from cluster.run.status import Failure, Status
from cluster.slurm.again import Again
from cluster.slurm.status import watcher_id, write_job_id
from cluster.slurm.verdict import OUT_OF_MEMORY, Verdict

logger = logging.getLogger(__name__)

T = TypeVar("T")

DISK_PATIENCE = 30.0  # seconds: a disk may be full for a while
DISK_PAUSE = 1.0


def finish(
    run: RunFolder,
    now: Status,
    found: Verdict,
    start_again: Callable[[], Again],
    *,
    at: float | None = None,
) -> Status:
    """Have the run go on after an attempt, or end.

    Args:
        now: its status in that attempt.
        found: how the attempt ended.
        start_again: called if it may go on.
        at: when the attempt ended; None is now.

    Returns:
        Its status since.
    """
    if found.cause is None:
        return stop(run, now, State.COMPLETED, found.failure, at=at)
    ended = Restart.of(run, attempt=now.attempt, cause=found.cause, failure=found.failure)
    after, last = now.stopped(State.PENDING, at=at), _why_not_again(run, now, ended, found)
    if last is None:
        logger.info("%s%s: starting again", ended.cause, f": {ended.message}" if ended.message else "")
        again = start_again()
        if not again.answered and watcher_id(run):
            keep(lambda: _add(run, ended))
            return now  # the watcher has time to wait, and holds no nodes
        if again.cancelled:
            last = State.CANCELLED, None
        elif not again.job:
            message = (
                f"{ended.cause}: {ended.message}; and SLURM does not start it again: {again.why}; "
                "`submit resume` goes on from the last checkpoint"
            )
            last = State.FAILED, Failure(rank=None, type="Requeue", message=message)
        after = replace(after, id=again.job or now.id)
    keep(lambda: _add(run, ended))
    if last is not None:
        return stop(run, after, *last)
    keep(lambda: run.write_status(after))
    keep(lambda: write_job_id(run, after.id))
    return after


def stop(
    run: RunFolder, status: Status, state: State, failure: Failure | None, *, at: float | None = None
) -> Status:
    """The run ends here, and people are told."""
    if state is State.FAILED and failure is not None and failure.type == OUT_OF_MEMORY:
        state = State.OUT_OF_MEMORY
    status = status.stopped(state, failure=failure, at=at)
    logger.info("%s%s", state, "" if failure is None else f": {failure.message}")
    keep(lambda: run.write_status(status))
    notify(run, status)
    return status


def keep(write: Callable[[], None]) -> None:
    """Write something down, if the disk takes it in time."""
    try:
        patiently(write)
    except OSError as error:
        logger.error("%s", error)


def patiently(act: Callable[[], T]) -> T:
    """Do something again, and again, while the disk fails.

    Raises:
        OSError: if it does not stop to.
    """
    deadline = time.monotonic() + DISK_PATIENCE
    while True:
        try:
            return act()
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("%s; trying again", error)
            time.sleep(DISK_PAUSE)


def _why_not_again(
    run: RunFolder, now: Status, ended: Restart, found: Verdict
) -> tuple[State, Failure | None] | None:
    """How the run ends; None if it may start again."""
    failure = found.failure
    if found.cancelled or run.cancel_requested():
        return State.CANCELLED, None
    if failure is not None and failure.user_error:
        return State.FAILED, failure
    before = [restart for restart in read_restarts(run) if restart.attempt < ended.attempt]
    why = spent([*before, ended], run.read_job(), since=now.first_attempt)
    if why is None:
        return None
    failure = failure or Failure(rank=None, type="Restarts", message=why)
    return State.FAILED, failure if why == failure.message else replace(failure, message=why)


def _add(run: RunFolder, ended: Restart) -> None:
    """Write the end of an attempt down, unless its batch script came so far."""
    if last_attempt(run) < ended.attempt:
        add_restart(run, ended)
