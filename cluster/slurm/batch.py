"""What a batch script does around its ranks: `python -m cluster.slurm.batch unprepared|begin|end RUN`.

`unprepared` ends a run on whose node a line of the site's setup failed.

`begin` says why the attempt before this one ended, if nobody could, and whether there is anything to do.
`end` looks at how the ranks ended and has SLURM start the job again, or lets it go and tells why.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from cluster.host import node_name
from cluster.job import State
from cluster.output_trouble import trouble
from cluster.run.folder import RunFolder, slurm_job
from cluster.run.notify import is_untold
from cluster.run.restarts import Cause, Restart, add_restart, last_attempt, read_restarts, spent
from cluster.run.status import Failure, Status
from cluster.slurm.again import Again, start_again
from cluster.slurm.finish import finish, patiently, stop
from cluster.slurm.script import NOTHING_TO_DO
from cluster.slurm.status import write_job_id
from cluster.slurm.verdict import ended_as_asked, lost, verdict
from cluster.slurm.watch import end_watch, set_watch

logger = logging.getLogger(__name__)


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
    status = run.read_status()
    try:
        return patiently(lambda: _begin(run))
    except OSError as error:
        told = trouble(error, written=run.path)
        message = str(error if told is None else told)
        failure = Failure(rank=None, type="Disk", message=message, node=node_name(), user_error=True)
        return _stop(run, status, State.FAILED, failure)


def _begin(run: RunFolder) -> int:
    status, start = run.read_status(), _start()
    if status.state is State.COMPLETED:
        logger.info("%s is complete: nothing to do", run.path)
        return NOTHING_TO_DO
    if status.started is not None:  # the batch script before this one did not live to its `end`
        cause = Cause.PREEMPTED if ended_as_asked(run, status) else Cause.LOST
        failure = lost(status) if cause is Cause.LOST else None
        after = status.stopped(State.PENDING, at=run.last_sign())
        if last_attempt(run) < status.attempt:  # or not to the end of its books
            add_restart(run, Restart.of(run, attempt=status.attempt, cause=cause, failure=failure))
        run.write_status(after)
        status = after
    if run.cancel_requested():
        return _stop(run, status, State.CANCELLED, None)
    if (why := spent(read_restarts(run), run.read_job(), since=status.first_attempt)) is not None:
        return _stop(run, status, State.FAILED, Failure(rank=None, type="Restarts", message=why))
    run.clear_attempt()
    # First, for whoever submitted it may have died of it, and what comes after the status is not tried again.
    write_job_id(run, slurm_job())
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
    logger.info("attempt %d on %s", status.attempt, status.nodes)
    return 0


def end(run: RunFolder, *, status: int, stopped: bool) -> int:
    """Decide what the end of the ranks means.

    Returns:
        What the script ends with, if SLURM has not ended it before: 0 if the run is complete.
    """
    now = run.read_status()
    run.refuse_if_superseded()
    found = verdict(run, now, srun=status, stopped=stopped)

    def again() -> Again:
        going_on = start_again(run, now.id, start=_start())
        run.refuse_if_superseded()  # a node that has lost the others may have waited long
        return going_on

    after = finish(run, now, found, again)
    if after.id != now.id:
        set_watch(run, after.id)
    return _done(run, after)


def _stop(run: RunFolder, status: Status, state: State, failure: Failure | None) -> int:
    return _done(run, stop(run, status, state, failure))


def _done(run: RunFolder, status: Status) -> int:
    """Dismiss the watcher of a run that has ended; what the script ends with."""
    if status.state.ended and not is_untold(run):
        end_watch(run)
    return 0 if status.state is State.COMPLETED else 1


def _start() -> int:
    """Which start of this submission it is, from 0."""
    return int(os.environ["SUBMIT_START"])


if __name__ == "__main__":
    main()
