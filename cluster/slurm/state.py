"""What SLURM says of a job: from sacct where there is accounting, else from the controller."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cluster.errors import UserError
from cluster.job import State
from cluster.slurm.command import call

PATIENCE = 20  # seconds: with a broken accounting daemon sacct hangs

STATES = {
    "PENDING": State.PENDING,
    "REQUEUED": State.PENDING,
    "REQUEUE_HOLD": State.PENDING,
    "REQUEUE_FED": State.PENDING,
    "SPECIAL_EXIT": State.PENDING,
    "RESV_DEL_HOLD": State.PENDING,
    "RUNNING": State.RUNNING,
    "CONFIGURING": State.RUNNING,
    "COMPLETING": State.RUNNING,
    "SIGNALING": State.RUNNING,
    "STAGE_OUT": State.RUNNING,
    "STOPPED": State.RUNNING,
    "SUSPENDED": State.RUNNING,
    "RESIZING": State.RUNNING,
    "COMPLETED": State.COMPLETED,
    "CANCELLED": State.CANCELLED,
    "REVOKED": State.CANCELLED,
    "TIMEOUT": State.TIMEOUT,
    "DEADLINE": State.TIMEOUT,
    "NODE_FAIL": State.NODE_FAIL,
    "BOOT_FAIL": State.NODE_FAIL,
    "PREEMPTED": State.PREEMPTED,
    "OUT_OF_MEMORY": State.OUT_OF_MEMORY,
    "FAILED": State.FAILED,
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One look at a job.

    Attributes:
        state: in our words.
        word: in SLURM's.
        reason: why it waits; empty otherwise.
        nodes: where it runs or ran; None if nowhere.
        restarts: how often it was requeued; None if the source does not say.
        limit: when its time is over; None if it has no limit, or the source does not say.
    """

    state: State
    word: str
    reason: str = ""
    nodes: str | None = None
    restarts: int | None = None
    limit: datetime | None = None


class NoAnswerError(Exception):
    """SLURM cannot be asked now: its controller is down, or slow. That says nothing of the job."""


def find_state(job_id: str) -> Seen | None:
    """The newest word on a job: the controller's while it remembers the job, else the accounting's.

    None if neither knows it.

    Raises:
        NoAnswerError: if the controller cannot be asked, and the accounting knows nothing.
    """
    try:
        seen = from_controller(job_id)
    except NoAnswerError:
        if (seen := from_accounting(job_id)) is None:
            raise
        return seen
    return seen or from_accounting(job_id)


def from_controller(job_id: str) -> Seen | None:
    """From `scontrol show job`, which forgets a job some minutes after its end.

    Raises:
        NoAnswerError: if it cannot be asked.
    """
    answer = _ask(["scontrol", "--oneliner", "show", "job", job_id])
    if answer is not None and "Invalid job id" in answer.stderr:
        return None
    if answer is None or answer.returncode != 0 or "JobId=" not in answer.stdout:
        raise NoAnswerError
    fields = dict(re.findall(r"(\w+)=(\S*)", answer.stdout))
    reason = fields.get("Reason", "None")
    return seen_as(
        fields["JobState"],
        reason="" if reason == "None" else reason,
        nodes=fields.get("NodeList", "(null)"),
        restarts=int(fields.get("Restarts", "0")),
        limit=_limit(fields.get("StartTime", ""), fields.get("TimeLimit", "")),
    )


def from_accounting(job_id: str) -> Seen | None:
    """From sacct; many sites have no accounting."""
    answer = _ask(
        ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State,NodeList", f"--jobs={job_id}"]
    )
    lines = [] if answer is None else [line for line in answer.stdout.splitlines() if "|" in line]
    if not lines:
        return None
    word, _, nodes = lines[-1].partition("|")
    return seen_as(word.split()[0], nodes=nodes)  # "CANCELLED by 1000"


def _limit(start: str, limit: str) -> datetime | None:
    """When the time of a job is over: "2026-01-01T00:00:00" and "1-02:00:00". Not its EndTime, which a
    preemption brings forward.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if found is None or not re.match(r"\d{4}-", start):
        return None
    days, hours, minutes, seconds = (int(number or 0) for number in found.groups())
    return datetime.fromisoformat(start) + timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def nodes_down(nodes: str) -> list[str]:
    """Those of a list of nodes, in SLURM's notation, that are down or do not answer."""
    answer = _ask(["sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N %t"])
    lines = [] if answer is None else answer.stdout.splitlines()
    rows = {name: state for name, _, state in (line.partition(" ") for line in lines)}
    return sorted(name for name, state in rows.items() if state.startswith("down") or state.endswith("*"))


def find_job(name: str) -> str | None:
    """The id of this user's job of that name that waits or runs; None if there is none.

    Raises:
        NoAnswerError: if the controller cannot be asked.
    """
    answer = _ask(["squeue", "--noheader", "--me", f"--name={name}", "--format=%A"])
    if answer is None or answer.returncode != 0:
        raise NoAnswerError
    return next(iter(answer.stdout.split()), None)


def seen_as(
    word: str,
    *,
    reason: str = "",
    nodes: str = "(null)",
    restarts: int | None = None,
    limit: datetime | None = None,
) -> Seen:
    known = STATES.get(word.rstrip("+"))
    return Seen(
        # A word that a later SLURM invents is no end: whoever waits asks again.
        state=State.RUNNING if known is None else known,
        word=word,
        reason=reason,
        nodes=None if nodes in ("(null)", "None assigned", "") else nodes,
        restarts=restarts,
        limit=limit,
    )


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    """A command's answer; None if it cannot be had."""
    try:
        return call(command, patience=PATIENCE)
    except UserError:
        return None
