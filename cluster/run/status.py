"""The state of a run: what its folder says, and why it ended."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.errors import UserError
from cluster.host import Process
from cluster.job import ExecutorName, State
from cluster.wording import visible

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a run failed: the first rank that did.

    Args:
        rank: None when no rank is to blame (the launcher was killed).
        type: the exception's name, or "Killed" / "Exit".
        message: the exception's text.
        user_error: the message is a complete sentence for the user; no traceback is wanted.
        traceback: empty when there was none.
        log_tail: the last lines of the rank's log.
        node: the machine it happened on.
        by_peer: it lost the connection to another rank: that one ended first, for a reason of its own.
    """

    rank: int | None
    type: str
    message: str
    user_error: bool = False
    traceback: str = ""
    log_tail: tuple[str, ...] = ()
    node: str | None = None
    by_peer: bool = False


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run's state and how it came to it. Times are seconds since the epoch.

    Attributes:
        attempt: starts over the run's life; `first_attempt` is what it was when last submitted.
        started, nodes: of the present or last attempt; `start` is its number in the present submission.
        reason: why it waits, in the scheduler's word; or why its state is unknown.
        since: of an unknown state: when the run last gave a sign of itself.
        gpus: devices held while it runs.
        seconds, gpu_hours: that all attempts have taken until `started`, or to the end.
    """

    state: State
    name: str
    executor: ExecutorName
    id: str
    ranks: int
    attempt: int
    submitted: float
    ended: float | None = None
    launcher: Process | None = None
    failure: Failure | None = None
    first_attempt: int = 0
    started: float | None = None
    nodes: str | None = None
    reason: str = ""
    since: float | None = None
    start: int = 0
    gpus: int = 0
    seconds: float = 0.0
    gpu_hours: float = 0.0

    @property
    def token(self) -> str:
        """Names the start of the attempt as its ranks do, see `cluster.run.folder.start_token`."""
        return f"{self.id}.{self.start}"

    def stopped(self, state: State, *, failure: Failure | None = None, at: float | None = None) -> Status:
        """The same run after its attempt has ended, now or `at` seconds since the epoch; `state` may be
        "pending": it starts again.
        """
        now = time.time()
        held = 0.0 if self.started is None else max(0.0, (now if at is None else at) - self.started)
        return replace(
            self,
            state=state,
            ended=now if state.ended else None,
            failure=failure,
            started=None,
            seconds=self.seconds + held,
            gpu_hours=self.gpu_hours + self.gpus * held / 3600,
        )

    def until_now(self) -> Status:
        """The same, with what the present attempt has taken so far counted in."""
        if self.state in (State.RUNNING, State.SUSPENDED):
            return self.stopped(self.state)
        return self.stopped(State.UNKNOWN, at=self.since) if self.state is State.UNKNOWN else self

    def to_json(self) -> dict[str, Any]:
        """Plain values for status.json and `--json`."""
        return asdict(self)


def in_words(state: str, *, reason: str, since: float | None) -> str:
    """A state, and why: "pending (Resources)", "unknown since 12:04: slurmctld does not answer"."""
    if state != State.UNKNOWN:
        return state + (f" ({reason})" if reason and state != State.RUNNING else "")
    return f"{state}{'' if since is None else f' since {_moment(since)}'}: {reason}"


def _moment(seconds: float) -> str:
    """The time of day; of another day, with its date."""
    when, today = time.localtime(seconds), time.localtime()
    return time.strftime("%H:%M" if when[:3] == today[:3] else "%Y-%m-%d %H:%M", when)


def raise_unless_completed(status: Status, *, remedy: str | None = None) -> None:
    """Turn an end that is not completion into the exception that tells the user why.

    Args:
        remedy: what to do about any other failure than a mistake of the user's: it is told as one then, and
            the end of the rank's log is logged here.

    Raises:
        UserError: if the run was stopped, or failed for a reason that the user can mend.
        RuntimeError: if it failed for another reason, and there is no remedy.
    """
    if status.state is State.COMPLETED:
        return
    if status.failure is not None and status.failure.user_error:
        raise UserError(status.failure.message)
    if status.state in (State.PREEMPTED, State.CANCELLED):
        raise UserError(why(status))
    if remedy is None:
        raise RuntimeError(explain(status))
    for line in () if status.failure is None else status.failure.log_tail:
        logger.error("    %s", visible(line))
    raise UserError(f"{status.name}: {why(status)}; {remedy}")


def explain(status: Status) -> str:
    """Why a run is where it is, in a sentence; for a crash, followed by the end of the rank's log."""
    failure = status.failure
    crashed = failure is not None and failure.rank is not None and not failure.user_error
    tail = failure.log_tail if failure is not None and crashed else ()
    return "\n".join([why(status), *(f"    {line}" for line in tail)])


def why(status: Status) -> str:
    """Why a run is where it is, in a sentence."""
    if status.failure is None:
        return {
            State.PREEMPTED: f"{status.name} was stopped; "
            "give the same command again to go on from where it last saved",
            State.CANCELLED: f"{status.name} was cancelled; give the same command again to go on",
        }.get(
            status.state,
            f"{status.name} is {in_words(status.state, reason=status.reason, since=status.since)}",
        )
    failure = status.failure
    if failure.rank is None or failure.user_error:
        return failure.message
    where = f" on {failure.node}" if failure.node and status.executor != "local" else ""
    who, what = f"rank {failure.rank} of {status.ranks}{where}", f"{failure.type}: {failure.message}"
    if status.state is State.COMPLETED:
        return f"{status.name} is completed; after its work was done, {who} failed: {what}"
    return f"{who} failed first: {what}"
