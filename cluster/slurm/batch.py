"""What a batch script does around its ranks: `python -m cluster.slurm.batch unprepared|begin|end RUN`.

`unprepared` ends a run on whose node a line of the site's setup failed.

`begin` says why the attempt before this one ended, if nobody could, and whether there is anything to do.
`end` looks at how the ranks ended and has SLURM start the job again, or lets it go and tells why.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from cluster.errors import UserError
from cluster.host import node_name
from cluster.job import PREEMPTED_EXIT_CODE, State
from cluster.run.folder import RunFolder, slurm_job, start_token
from cluster.run.notify import notify
from cluster.run.restarts import Cause, Restart, add_restart, read_restarts, spent
from cluster.run.status import Failure, Status
from cluster.site import read_site
from cluster.slurm.command import call
from cluster.slurm.script import NOTHING_TO_DO
from cluster.slurm.state import NoAnswerError, from_controller, nodes_down
from cluster.slurm.status import write_job_id

logger = logging.getLogger(__name__)

REQUEUE_PATIENCE = 600.0  # seconds: a controller may be restarting
REQUEUE_PAUSE = 10.0
OUT_OF_MEMORY = "OutOfMemory"
# "srun: error: node2: task 5: Killed", "srun: error: node1: tasks 0-3: Exited with exit code 1"
TASK_ENDED = re.compile(
    r"^srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)[\d,-]*: (?P<how>.+)$", re.MULTILINE
)
# How a rank ends that was asked to: with its status, or, before it could hear, by the signal.
ASKED = (f"Exited with exit code {PREEMPTED_EXIT_CODE}", "Terminated", "User defined signal 2")
# What SLURM writes when somebody cancels the job; if it ends one itself, " DUE TO ..." is before the stars.
CANCELLED = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+ \*\*\*")


def main() -> None:
    """The command of the batch script; the exit status is what the script goes by."""
    parser = argparse.ArgumentParser()
    parser.add_argument("moment", choices=["unprepared", "begin", "end"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--status", type=int, default=0, help="srun's exit status")
    parser.add_argument("--line", default="", help="what failed with that status")
    parser.add_argument("--stopped", action="store_true", help="the script itself was asked to end")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s slurm %(message)s")
    run = RunFolder(options.run)
    if options.moment == "unprepared":
        sys.exit(unprepared(run, line=options.line, status=options.status))
    if options.moment == "begin":
        sys.exit(begin(run))
    sys.exit(end(run, status=options.status, stopped=options.stopped))


def unprepared(run: RunFolder, *, line: str, status: int) -> int:
    """End a run whose node could not be made ready: what is missing now will be missing again."""
    before = run.read_status()
    if before.state is State.COMPLETED:  # by the job that this one waited for
        return NOTHING_TO_DO
    message = (
        f"{line!r} ended with status {status} on {node_name()}, before the ranks: mend `setup` or `modules` "
        "in the site file, then submit the run again"
    )
    failure = Failure(rank=None, type="Setup", message=message, node=node_name())
    return _stop(run, before, State.FAILED, failure)


def begin(run: RunFolder) -> int:
    """Account for the attempt before, and start this one.

    Returns:
        0 to go on; NOTHING_TO_DO if the run is complete; 1 if it must not start again.
    """
    status, start = run.read_status(), _start()
    if status.state is State.COMPLETED:
        logger.info("%s is complete: nothing to do", run.path)
        return NOTHING_TO_DO
    if status.started is not None:  # the batch script before this one did not live to its `end`
        cause = Cause.PREEMPTED if _ended_as_asked(run, status.start) else Cause.LOST
        failure = _lost(status) if cause is Cause.LOST else None
        status = _close_attempt(run, status, cause, failure, at=run.last_sign())
    if run.cancel_requested():
        return _stop(run, status, State.CANCELLED, None)
    if (why := spent(read_restarts(run), run.read_job(), since=status.first_attempt)) is not None:
        return _stop(run, status, State.FAILED, Failure(rank=None, type="Restarts", message=why))
    run.clear_attempt()
    status = replace(
        status,
        state=State.RUNNING,
        id=slurm_job(),
        attempt=status.attempt + 1,
        started=time.time(),
        start=start,
        nodes=os.environ["SLURM_JOB_NODELIST"],
        failure=None,
    )
    run.write_status(status)
    write_job_id(run, status.id)  # whoever submitted it may have died of it
    logger.info("attempt %d on %s", status.attempt, status.nodes)
    return 0


def end(run: RunFolder, *, status: int, stopped: bool) -> int:
    """Decide what the end of the ranks means.

    Returns:
        What the script ends with, if SLURM has not ended it before: 0 if the run is complete.
    """
    now, start = run.read_status(), _start()
    run.refuse_if_superseded()
    failure = run.first_error(start=start_token())
    if _ended_as_asked(run, start):
        cause = Cause.TIME_LIMIT if _time_is_over(run) else Cause.PREEMPTED
    elif status == 0 and failure is None:
        return _stop(run, now, State.COMPLETED, None)
    else:
        cause, failure = _blame(run, now, failure, stopped=stopped)
    now = _close_attempt(run, now, cause, failure)
    if run.cancel_requested() or CANCELLED.search(_log_of_this_attempt(run)):
        return _stop(run, now, State.CANCELLED, None)
    if failure is not None and failure.user_error:
        return _stop(run, now, State.FAILED, failure)
    why = spent(read_restarts(run), run.read_job(), since=now.first_attempt)
    if why is not None:
        failure = failure or Failure(rank=None, type="Restarts", message=why)
        return _stop(
            run, now, State.FAILED, failure if why == failure.message else replace(failure, message=why)
        )
    logger.info("%s: starting again", cause if failure is None else f"{cause}: {failure.message}")
    _requeue(start)
    return 1


def _ended_as_asked(run: RunFolder, start: int) -> bool:
    """Whether all ranks had saved, or had nothing to save yet.

    The mark alone does not tell: once one rank has crashed, srun asks the others to end, and one that had not
    begun to work yet makes the mark. srun's status does not tell either: it is 143 or 137 for both.
    """
    first = _first_to_end(run)
    crashed = first is not None and first["how"] not in ASKED
    token = f"{slurm_job()}.{start}"
    return run.requeue_mark(start).exists() and run.first_error(start=token) is None and not crashed


def _time_is_over(run: RunFolder) -> bool:
    """Whether it was the time limit that asked the ranks to stop; SLURM may do so a minute early."""
    try:
        seen = from_controller(slurm_job())
    except NoAnswerError:
        return False
    asked = timedelta(seconds=read_site(run.path / "site.yaml").signal_seconds + 60)
    return seen is not None and seen.limit is not None and datetime.now() > seen.limit - asked


def _blame(
    run: RunFolder, status: Status, failure: Failure | None, *, stopped: bool
) -> tuple[Cause, Failure | None]:
    """Why the ranks ended, who is to blame, when nobody had asked them to end together."""
    if failure is not None and failure.type == "Hang":
        return Cause.HANG, failure
    if down := nodes_down(status.nodes or ""):
        # Its peers have errors of their own: their connections broke.
        return Cause.LOST, _lost(status, down)
    first = _first_to_end(run)
    if failure is None and (stopped or (first is not None and first["how"] in ASKED)):
        return Cause.LOST, None
    return Cause.CRASH, _killed_rank(run) or failure or Failure(
        rank=None, type="Exit", message=f"the ranks ended without a word; see {run.path / 'logs'}"
    )


def _killed_rank(run: RunFolder) -> Failure | None:
    """The rank that srun saw end first, if it could write nothing: its peers failed of it."""
    first = _first_to_end(run)
    if first is None or first["how"] in ASKED or run.error(int(first["rank"])).is_file():
        return None
    hint = " (out of memory?)" if "Killed" in first["how"] else ""
    rank = int(first["rank"])
    return Failure(
        rank=rank,
        type=OUT_OF_MEMORY if "Out Of Memory" in first["how"] else "Killed",
        message=f"{first['how']}{hint}",
        node=first["node"],
        log_tail=tuple(run.tail(rank)),
    )


def _first_to_end(run: RunFolder) -> re.Match[str] | None:
    """What srun said of the first rank of this attempt that did not end with status 0."""
    return TASK_ENDED.search(_log_of_this_attempt(run))


def _log_of_this_attempt(run: RunFolder) -> str:
    """What SLURM and srun have said since the ranks were started."""
    log = run.path / "logs" / "slurm.log"
    text = log.read_text(errors="replace") if log.is_file() else ""
    return text.rpartition(" slurm attempt ")[2]


def _lost(status: Status, down: list[str] | None = None) -> Failure:
    down = nodes_down(status.nodes or "") if down is None else down
    where = ", ".join(down) if down else None
    return Failure(
        rank=None,
        type="Lost",
        message="the job was ended from outside before all ranks had saved"
        if where is None
        else f"node {where} is down or does not answer",
        node=where,
    )


def _close_attempt(
    run: RunFolder, status: Status, cause: Cause, failure: Failure | None, *, at: float | None = None
) -> Status:
    """Write the end of an attempt, now or at that time, down. The state becomes "pending": whether it starts
    again comes next.
    """
    add_restart(run, Restart.of(run, attempt=status.attempt, cause=cause, failure=failure))
    status = status.stopped(State.PENDING, at=at)
    run.write_status(status)
    return status


def _stop(run: RunFolder, status: Status, state: State, failure: Failure | None) -> int:
    """The run ends here."""
    if failure is not None and failure.type == OUT_OF_MEMORY:
        state = State.OUT_OF_MEMORY
    status = status.stopped(state, failure=failure)
    run.write_status(status)
    logger.info("%s%s", state, "" if failure is None else f": {failure.message}")
    notify(run, status)
    return 0 if state is State.COMPLETED else 1


def _requeue(start: int) -> None:
    """Have SLURM start this job again, before the script ends: what waits for the job goes on waiting."""
    job = slurm_job()  # of an array this task alone
    deadline = time.monotonic() + REQUEUE_PATIENCE
    while True:
        try:
            seen = from_controller(job)
            if seen is not None and (seen.restarts or 0) > start:
                return  # SLURM is at it already
            answer = call(["scontrol", "requeue", job])
            if answer.returncode == 0:
                return
            why = answer.stderr.strip()
        except (NoAnswerError, UserError) as error:
            why = str(error) or "its controller does not answer"
        if time.monotonic() > deadline:
            logger.error("SLURM does not start job %s again: %s", job, why)
            return
        logger.warning("SLURM does not start job %s again yet: %s", job, why)
        time.sleep(REQUEUE_PAUSE)


def _start() -> int:
    """Which start of this submission it is, from 0."""
    return int(os.environ["SUBMIT_START"])


if __name__ == "__main__":
    main()
