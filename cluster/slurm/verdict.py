"""How an attempt on SLURM ended, and by whom: from SLURM's own words, and by what became of each rank.

Never by whose error is the older: clocks of nodes differ, and all of them fail once one is gone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from cluster.job import PREEMPTED_EXIT_CODE, State
from cluster.run.folder import RunFolder
from cluster.run.restarts import Cause
from cluster.run.status import Failure, Status
from cluster.site import read_site
from cluster.slurm.script import seconds_to_save
from cluster.slurm.state import NoAnswerError, Seen, from_controller, nodes_down
from cluster.slurm.status import watcher_id

OUT_OF_MEMORY = "OutOfMemory"
# "srun: error: node2: task 5: Killed", "srun: error: node1: tasks 0-3: Exited with exit code 1"
TASK_ENDED = re.compile(
    r"^srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)(?P<others>[\d,-]*): (?P<how>.+)$", re.MULTILINE
)
# How a rank ends that was asked to: with its status, or, before it could hear, by the signal.
ASKED = (f"Exited with exit code {PREEMPTED_EXIT_CODE}", "Terminated", "User defined signal 2", "Hangup")
# How one ends that wrote nothing, and that others may have brought about: srun kills, NCCL's watchdog aborts.
AMBIGUOUS = re.compile(r"Killed|Aborted|Exited")
# "*** JOB 7 ON n0 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***"; without a reason somebody did it.
# After "NODE FAILURE" comes where to read more.
CANCELLED = re.compile(
    r"\*\*\* (?P<what>JOB|STEP) (?P<id>\S+) ON \S+ CANCELLED AT \S+( DUE TO (?P<why>[A-Z ]+)[^*\n]*)? \*\*\*"
)
# srun's first word where it was not a rank's end that made it end the others.
ABORTED = re.compile(r"^srun: (forcing job termination|Job step aborted)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why the ranks of an attempt ended.

    Attributes:
        cause: None if they did what they were to do.
        cancelled: whether somebody cancelled the job, by SLURM's own command.
    """

    cause: Cause | None
    failure: Failure | None = None
    cancelled: bool = False


@dataclass(frozen=True, kw_only=True)
class _Traces:
    """What an attempt has left behind.

    Attributes:
        log: what SLURM and srun have said.
        failure: of the errors that ranks have written, the one that the others follow from.
        stopped: whether the batch script itself was asked to end.
        time_is_over: whether the job has come to its time limit.
    """

    run: RunFolder
    status: Status
    log: str
    failure: Failure | None
    stopped: bool
    time_is_over: bool

    @property
    def own_error(self) -> Failure | None:
        """The failure, if it is a rank's own."""
        return self.failure if self.failure is not None and not self.failure.by_peer else None


def verdict(run: RunFolder, status: Status, *, srun: int, stopped: bool) -> Verdict:
    """What the end of the ranks means.

    Args:
        status: of the attempt.
        srun: its exit status.
        stopped: whether the batch script itself was asked to end.
    """
    log, failure = log_of_attempt(run), run.first_error(start=status.token)
    if srun == 0 and failure is None:
        return Verdict(cause=None)
    seen = _seen(status)
    traces = _Traces(
        run=run,
        status=status,
        log=log,
        failure=failure,
        stopped=stopped,
        time_is_over=_time_is_over(run, seen),
    )
    if run.done_mark(status.start).exists():
        return Verdict(cause=None, failure=_culprit(traces))
    by_log = any(
        found["what"] == "JOB" and found["why"] is None and found["id"] != watcher_id(run)  # told there, too
        for found in CANCELLED.finditer(log)
    )
    cancelled = by_log or (seen is not None and seen.state is State.CANCELLED)
    if ended_as_asked(run, status):
        cause = Cause.TIME_LIMIT if traces.time_is_over else Cause.PREEMPTED
        return Verdict(cause=cause, cancelled=cancelled)
    cause, failure = _blame(traces)
    return Verdict(cause=cause, failure=failure, cancelled=cancelled)


def ended_as_asked(run: RunFolder, status: Status) -> bool:
    """Whether all ranks had saved, or had nothing to save yet.

    The mark alone does not tell: once one rank has crashed, srun asks the others to end, and one that had not
    begun to work yet makes the mark. srun's status does not tell either: it is 143 or 137 for both.
    """
    first = TASK_ENDED.search(log_of_attempt(run))
    error = run.first_error(start=status.token)
    crashed = first is not None and first["how"] not in ASKED
    return run.requeue_mark(status.start).exists() and error is None and not crashed


def log_of_attempt(run: RunFolder) -> str:
    """What SLURM and srun have said since the ranks were started."""
    log = run.path / "logs" / "slurm.log"
    text = log.read_text(errors="replace") if log.is_file() else ""
    return text.rpartition(" slurm attempt ")[2]


def lost(status: Status, down: list[str] | None = None) -> Failure:
    """The end of an attempt that a node, or nobody knows what, has taken."""
    down = nodes_down(status.nodes or "") if down is None else down
    if not down:
        return _from_outside("the job was ended from outside before all ranks had saved")
    where = ", ".join(down)
    return Failure(rank=None, type="Lost", message=f"node {where} is down or does not answer", node=where)


def _blame(traces: _Traces) -> tuple[Cause, Failure | None]:
    """Why the ranks ended, and who is to blame, when they were not asked to, or had not all saved."""
    failure = traces.failure
    if failure is not None and failure.type == "Hang":
        return Cause.HANG, failure
    if (told := _slurms_word(traces)) is not None:
        return told
    first = TASK_ENDED.search(traces.log)
    if failure is None and (traces.stopped or (first is not None and first["how"] in ASKED)):
        return Cause.LOST, None
    unknown = f"the ranks ended without a word; see {traces.run.path / 'logs'}"
    return Cause.CRASH, _culprit(traces) or Failure(rank=None, type="Exit", message=unknown)


def _slurms_word(traces: _Traces) -> tuple[Cause, Failure] | None:
    """What SLURM itself says about the end. It knows better than ranks that have lost each other."""
    if down := nodes_down(traces.status.nodes or ""):
        return Cause.LOST, lost(traces.status, down)
    if traces.own_error is not None:
        return None
    reasons = {found["why"] for found in CANCELLED.finditer(traces.log) if found["why"]}
    if "TIME LIMIT" in reasons or (traces.stopped and traces.time_is_over):
        return Cause.OUT_OF_TIME, _out_of_time(traces.run)
    if by_slurm := reasons & {"NODE FAILURE", "PREEMPTION", "JOB REQUEUE"}:
        why = " and ".join(sorted(map(str.lower, by_slurm)))
        return Cause.LOST, _from_outside(f"SLURM ended it, due to {why}, before all ranks had saved")
    first, aborted = TASK_ENDED.search(traces.log), ABORTED.search(traces.log)
    if aborted is not None and (first is None or aborted.start() < first.start()):
        why = "somebody cancelled it, or the slurmstepd of a node was killed"
        return Cause.LOST, _from_outside(f"the ranks' step was ended from outside: {why}")
    return None


def _culprit(traces: _Traces) -> Failure | None:
    """The rank that the others failed of: one that could write nothing any more, or one with an error of its
    own; None if nobody has said anything.
    """
    ends = _bad_ends(traces.log)
    silent = [end for end in ends if not traces.run.error(int(end["rank"])).is_file()]
    # By a signal that nobody sends; or first, by srun's clock.
    sure = [end for end in silent if end is ends[0] or not AMBIGUOUS.match(end["how"])]
    if sure:
        return _killed(traces, sure[0])
    if traces.own_error is not None or traces.failure is None:
        return traces.own_error
    if len(silent) == 1 and not silent[0]["others"]:
        return _killed(traces, silent[0])
    said = f"rank {traces.failure.rank} says: {traces.failure.message}"
    message = f"the ranks lost each other, and which ended first is unknown; {said}"
    return replace(traces.failure, rank=None, node=None, type="Unknown", message=message)


def _bad_ends(log: str) -> list[re.Match[str]]:
    """What srun said of ranks that ended otherwise than as they were asked to, in its order."""
    return [end for end in TASK_ENDED.finditer(log) if end["how"] not in ASKED]


def _killed(traces: _Traces, end: re.Match[str]) -> Failure:
    """A rank that srun saw end, and that could write nothing."""
    rank, how = int(end["rank"]), end["how"]
    of_memory = "Out Of Memory" in how or ("Killed" in how and "oom_kill event" in traces.log)
    hint = " (out of memory?)" if "Killed" in how and not of_memory else ""
    return Failure(
        rank=rank,
        type=OUT_OF_MEMORY if of_memory else "Killed",
        message=f"{how}{hint}",
        node=end["node"],
        log_tail=tuple(traces.run.tail(rank, token=traces.status.token)),
    )


def _from_outside(message: str) -> Failure:
    return Failure(rank=None, type="Lost", message=message)


def _out_of_time(run: RunFolder) -> Failure:
    seconds = seconds_to_save(run.read_job(), read_site(run.path / "site.yaml"))
    return Failure(
        rank=None,
        type="TimeLimit",
        message=f"its time was over before it could save: no step fits, with its save, into the {seconds} s "
        "after it is asked to; give it more time, or a larger signal_seconds in the site file",
    )


def _seen(status: Status) -> Seen | None:
    """What the controller says of the job now."""
    try:
        return from_controller(status.id)
    except NoAnswerError:
        return None


def _time_is_over(run: RunFolder, seen: Seen | None) -> bool:
    """Whether it was the time limit that asked the ranks to stop; SLURM may do so a minute early."""
    if seen is None or seen.limit is None or seen.state.ended:
        return seen is not None and seen.state is State.TIMEOUT
    asked = seconds_to_save(run.read_job(), read_site(run.path / "site.yaml"))
    return datetime.now() > seen.limit - timedelta(seconds=asked + 60)
