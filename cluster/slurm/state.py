"""What SLURM says of jobs: from the controller while it remembers them, else from sacct where there is
accounting.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cluster.errors import UserError
from cluster.job import State
from cluster.slurm.command import call

PATIENCE = 20  # seconds: with a broken accounting daemon sacct hangs
LOOK_PATIENCE = 2.0  # seconds: for the ping, of who only looks; one may look again
# Of a task of an array, after its id and its name: other ids have no dash, and other names end in a digest.
TASK = re.compile(r"_\d+$")
SILENCE = "slurmctld does not answer"

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
    "STOPPED": State.SUSPENDED,
    "SUSPENDED": State.SUSPENDED,
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


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What SLURM says of all jobs that it was asked about at a time.

    Attributes:
        asked: their ids, and the names of those whose ids nobody knew.
        ids: by name, of those of this user that wait or run.
        seen: by id; without those that SLURM knows nothing of.
        silence: why it says nothing at all; empty if it answers.
    """

    asked: frozenset[str]
    ids: Mapping[str, str] = field(default_factory=dict)
    seen: Mapping[str, Seen] = field(default_factory=dict)
    silence: str = ""


def ask(job_ids: Collection[str], names: Collection[str] = (), *, patience: float = PATIENCE) -> Answer:
    """The newest word on any number of jobs, by a few commands for all of them: the controller's while it
    remembers a job, else how it ended by the accounting. That is not asked in place of a controller that is
    silent: it learns all from the controller, and late.

    Args:
        patience: seconds that the controller may take to say that it is there. A long queue it may take as
            long as ever to tell.
    """
    asked = frozenset((*job_ids, *names))
    if not asked:
        return Answer(asked=asked)
    try:
        _refuse_silence(patience)
        ids = find_jobs(names) if names else {}
        wanted = {*job_ids, *ids.values()}
        seen = from_queue(wanted) if wanted else {}
    except NoAnswerError as error:
        return Answer(asked=asked, silence=str(error))
    if forgotten := wanted - set(seen):
        seen |= from_accounting(forgotten)
    return Answer(asked=asked, ids=ids, seen=seen)


def _refuse_silence(patience: float) -> None:
    """Other commands try for long to reach a controller that is down.

    Raises:
        NoAnswerError: if none answers.
    """
    if shutil.which("scontrol") is None:
        raise NoAnswerError("there is no SLURM on this machine")
    answer = _ask(["scontrol", "ping"], patience=patience)
    if answer is None or not re.search(r"\bUP\b", answer.stdout):
        raise NoAnswerError(SILENCE)


def from_queue(job_ids: Collection[str]) -> dict[str, Seen]:
    """From `squeue`, by id; the controller forgets a job some minutes after its end. Of an array, all tasks
    are asked for together.

    Raises:
        NoAnswerError: if it cannot be asked.
    """
    words = ["--noheader", "--all", "--array", "--states=all", "--format=%i|%T|%N|%r"]
    answer = _ask(["squeue", *words, f"--jobs={','.join(_whole(job_ids))}"])
    if answer is not None and "Invalid job id" in answer.stderr:  # if it is asked about one alone
        return {}
    if answer is None or answer.returncode != 0:
        raise NoAnswerError(SILENCE)
    rows = [line.split("|", 3) for line in answer.stdout.splitlines() if line.count("|") >= 3]
    return {
        job_id: seen_as(word, nodes=nodes, reason="" if reason == "None" else reason)
        for job_id, word, nodes, reason in rows
    }


def from_controller(job_id: str) -> Seen | None:
    """Of one job, what `squeue` does not tell: its restarts, and when its time is over.

    Raises:
        NoAnswerError: if it cannot be asked.
    """
    answer = _ask(["scontrol", "--oneliner", "show", "job", job_id])
    if answer is not None and "Invalid job id" in answer.stderr:
        return None
    if answer is None or answer.returncode != 0 or "JobId=" not in answer.stdout:
        raise NoAnswerError(SILENCE)
    fields = dict(re.findall(r"(\w+)=(\S*)", answer.stdout))
    reason = fields.get("Reason", "None")
    return seen_as(
        fields["JobState"],
        reason="" if reason == "None" else reason,
        nodes=fields.get("NodeList", "(null)"),
        restarts=int(fields.get("Restarts", "0")),
        limit=_limit(fields.get("StartTime", ""), fields.get("TimeLimit", "")),
    )


def from_accounting(job_ids: Collection[str]) -> dict[str, Seen]:
    """How jobs ended that the controller knows no more, by id; many sites have no accounting. That one runs
    is no news: the accounting has missed its end.
    """
    words = ["--noheader", "--parsable2", "--allocations", "--format=JobID,State,NodeList"]
    answer = _ask(["sacct", *words, f"--jobs={','.join(_whole(job_ids))}"])
    rows = [] if answer is None else [line.split("|") for line in answer.stdout.splitlines()]
    seen = {
        row[0]: seen_as(row[1].split()[0], nodes=row[2])  # "CANCELLED by 1000"
        for row in rows
        if len(row) == 3 and row[1].strip()
    }
    return {job_id: one for job_id, one in seen.items() if one.state.ended}


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


def shares_nodes(partition: str | None) -> bool:
    """Whether a job on one core leaves the rest of its node to others; None is the default partition.

    Raises:
        NoAnswerError: if the controller cannot be asked.
    """
    config = _ask(["scontrol", "show", "config"])
    answer = _ask(
        ["scontrol", "--oneliner", "show", "partition", *([] if partition is None else [partition])]
    )
    if config is None or answer is None or config.returncode != 0 or answer.returncode != 0:
        raise NoAnswerError(SILENCE)
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in answer.stdout.splitlines()]
    meant = [row for row in rows if partition is not None or row.get("Default") == "YES"]
    by_core = re.search(r"^SelectType\s*=\s*select/cons_", config.stdout, re.MULTILINE) is not None
    return by_core and bool(meant) and all(row.get("OverSubscribe") != "EXCLUSIVE" for row in meant)


def find_jobs(names: Collection[str]) -> dict[str, str]:
    """The ids of this user's jobs of those names that wait or run, by name: of a task, NAME_4 is the name as
    ID_4 is the id.

    Raises:
        NoAnswerError: if the controller cannot be asked.
    """
    words = ["--noheader", "--me", "--array", f"--name={','.join(_whole(names))}", "--format=%i|%j"]
    answer = _ask(["squeue", *words])
    if answer is None or answer.returncode != 0:
        raise NoAnswerError(SILENCE)
    rows = (line.partition("|") for line in answer.stdout.splitlines())
    return {name.strip() + "".join(TASK.findall(job_id)): job_id for job_id, _, name in rows}


def _whole(known: Collection[str]) -> list[str]:
    """Ids or names, those of arrays in place of their tasks'."""
    return sorted({TASK.sub("", one) for one in known})


def waiting_for(job_id: str) -> dict[str, str]:
    """The dependencies of this user's jobs that wait for that one to complete, by id.

    Raises:
        NoAnswerError: if the controller cannot be asked.
    """
    answer = _ask(["squeue", "--noheader", "--me", "--states=PENDING", "--format=%A|%E"])
    if answer is None or answer.returncode != 0:
        raise NoAnswerError(SILENCE)
    rows = (line.partition("|") for line in answer.stdout.splitlines())
    # "afterok:7(unfulfilled),singleton(unfulfilled)"
    found = {waits.strip(): re.sub(r"\(\w+\)", "", dependency) for waits, _, dependency in rows}
    return {
        waits: dependency
        for waits, dependency in found.items()
        if f"afterok:{job_id}" in dependency.split(",")
    }


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


def _ask(command: Sequence[str], *, patience: float = PATIENCE) -> subprocess.CompletedProcess[str] | None:
    """A command's answer; None if it cannot be had."""
    try:
        return call(command, patience=patience)
    except UserError:
        return None
