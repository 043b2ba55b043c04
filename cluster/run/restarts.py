"""How often a job may start again: a budget for each cause, spent only while no newer checkpoint appears.

`restarts.jsonl` in the run folder has one row for each attempt that ended without completing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Self

from cluster.errors import UserError
from cluster.job import Job
from cluster.run.folder import RunFolder
from cluster.run.status import Failure
from cluster.small_file import read_small
from cluster.typed_json import parse_record

logger = logging.getLogger(__name__)


class Cause(StrEnum):
    """Why an attempt ended."""

    PREEMPTED = "preempted"  # asked to stop, by whomever, and saved
    TIME_LIMIT = "time_limit"  # the same, because its time was over
    OUT_OF_TIME = "out_of_time"  # its time was over before it had saved
    CRASH = "crash"  # a rank failed
    HANG = "hang"  # the watchdog saw no step
    LOST = "lost"  # a node, a link or the scheduler took it without a word


# Lost attempts are rarely the job's fault, but one that takes its node down each time must end some day; and
# one that is asked to stop this often before it has saved anything new never will.
MAX_LOST = 10
MAX_STOPPED = 30
MAX_OUT_OF_TIME = 3  # each of them costs all the time that there is


@dataclass(frozen=True, kw_only=True)
class Restart:
    """The end of one attempt.

    Attributes:
        attempt: counted from 1 over the run's life.
        cause, message: why it ended.
        rank, node: who is to blame, where known.
        checkpoint: name of the newest checkpoint at that time; None if there was none.
        time: seconds since the epoch.
    """

    attempt: int
    cause: Cause
    message: str
    rank: int | None = None
    node: str | None = None
    checkpoint: str | None = None
    time: float = 0.0

    @classmethod
    def of(cls, run: RunFolder, *, attempt: int, cause: Cause, failure: Failure | None = None) -> Self:
        """What is known now of an attempt that has just ended."""
        words = {
            Cause.PREEMPTED: "asked to stop, and saved",
            Cause.TIME_LIMIT: "its time was over; it has saved",
            Cause.LOST: "ended without a word",
        }
        return cls(
            attempt=attempt,
            cause=cause,
            message=words.get(cause, "") if failure is None else f"{failure.type}: {failure.message}",
            rank=None if failure is None else failure.rank,
            node=None if failure is None else failure.node,
            checkpoint=newest_checkpoint(run),
            time=time.time(),
        )


def read_restarts(run: RunFolder) -> list[Restart]:
    """Every end so far, oldest first. A row that is damaged, such as by a power cut, is left out."""
    path = run.path / "restarts.jsonl"
    restarts = []
    for row in read_small(path).splitlines() if path.is_file() else []:
        try:
            restarts.append(parse_record(Restart, row, where=f"a row of {path}", remedy="it is left out"))
        except UserError as error:
            logger.warning("%s", error)
    return restarts


def last_attempt(run: RunFolder) -> int:
    """The highest attempt whose end was written down; 0 if there is none."""
    return max((restart.attempt for restart in read_restarts(run)), default=0)


def add_restart(run: RunFolder, restart: Restart) -> None:
    """Write one end down."""
    with (run.path / "restarts.jsonl").open("a+b") as file:
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + json.dumps(asdict(restart)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def spent(restarts: list[Restart], job: Job, *, since: int = 0) -> str | None:
    """Why the newest end in the list is the last; None while the job may start again.

    Args:
        restarts: every end of the run, oldest first.
        job: has the budget.
        since: attempts up to this one do not count: somebody has submitted the run anew since.
    """
    if not restarts:
        return None
    last = restarts[-1]
    budget = {
        Cause.PREEMPTED: MAX_STOPPED,
        Cause.TIME_LIMIT: MAX_STOPPED,
        Cause.OUT_OF_TIME: MAX_OUT_OF_TIME,
        Cause.LOST: MAX_LOST,
    }.get(last.cause, job.max_crashes)
    # Those that ended with the checkpoint that the last one ended with made no progress.
    alike = [
        restart
        for restart in restarts
        if restart.attempt > since and restart.cause is last.cause and restart.checkpoint == last.checkpoint
    ]
    if len(alike) < budget:
        return None
    if budget == 1:
        return last.message
    progress = "any checkpoint" if last.checkpoint is None else f"a checkpoint newer than {last.checkpoint}"
    return f"{len(alike)} attempts ended by {last.cause} without {progress}; the last: {last.message}"


def set_aside(run: RunFolder) -> list[str]:
    """The checkpoints of a run that were found damaged, by name, oldest first."""
    return sorted(path.name for path in (run.path / "checkpoints").glob("broken-*"))


def newest_checkpoint(run: RunFolder) -> str | None:
    """The name in `checkpoints/latest`: to this floor no more than a mark of progress."""
    path = run.path / "checkpoints" / "latest"
    return read_small(path, most=1000).decode(errors="replace").strip() if path.is_file() else None
