"""The actor that sees a run through on Ray: one per run, named after its folder, outliving who submitted it.

When a rank, a node or this actor itself goes, all ranks end and start again from the last checkpoint, as
often as the run's budget allows.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.job import State
from cluster.ray.connect import load_ray
from cluster.ray.gang import End, Gang, Wishes
from cluster.ray.rank_worker import last_sharer, share_lock
from cluster.run.folder import RunFolder
from cluster.run.notify import notify
from cluster.run.restarts import Cause, Restart, add_restart, read_restarts, spent
from cluster.run.status import Failure, Status

logger = logging.getLogger(__name__)

PAUSE = 1.0  # seconds before a run starts again: one that ends at once must not keep a cluster busy
# A file server lets go of what a dead node had locked after its lease: 90 s for NFS 4.
LOCK_PATIENCE = 120.0


class Supervisor:
    """Sees one submission of a run to its end. Ray makes it anew, on another node, when it is lost.

    Args:
        folder: the run's, on a file system that all nodes share; the job and its status are in it.
        name: this actor's own, for the names of its ranks.
        runtime_env: of the ranks.
    """

    def __init__(self, folder: str, name: str, runtime_env: dict[str, Any]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s supervisor %(message)s")
        self._run = RunFolder(Path(folder))
        self._job = self._run.read_job()
        self._name = name
        self._runtime_env = runtime_env
        self._wishes = Wishes(self._run)
        self._lock = share_lock(self._run)
        self._actor = load_ray().get_runtime_context().current_actor
        # Not a call by the submitter, which may be gone when this actor is made anew; nor one by the actor
        # to itself, which Ray drops then: it is "restarting" still.
        threading.Thread(target=self._supervise, daemon=True).start()

    def ready(self) -> None:
        """Answers once the actor has taken the run."""

    def ask(self, number: int) -> None:
        """Have the ranks save and end, and do not start them again."""
        self._wishes.ask(number)

    def _supervise(self) -> None:
        """The whole life of the submission; the actor ends with it, and its name is free again."""
        try:
            self._see_through()
        except Exception as error:
            failure = Failure(
                rank=None,
                type=type(error).__name__,
                message=f"the supervisor of {self._run.path} failed: {type(error).__name__}: {error}",
                traceback=traceback.format_exc(),
            )
            self._stop(self._run.read_status(), State.FAILED, failure)
        finally:
            # Also when nothing can be written any more: whoever looks sees that the actor has gone.
            self._lock.close()
            load_ray().kill(self._actor, no_restart=True)

    def _see_through(self) -> None:
        status = self._run.read_status()
        if status.state.ended:  # this actor was lost between its last word and its end
            return
        if status.started is not None:
            message = "the supervisor's node or its worker was gone"
            failure = Failure(rank=None, type="Lost", message=message)
            status = self._close_attempt(status, End(state=State.FAILED, cause=Cause.LOST, failure=failure))
        while (ended := self._why_not_again(status)) is None:
            if not last_sharer(self._lock, patience=LOCK_PATIENCE):
                logger.warning("ranks of an earlier attempt still hold %s/lock", self._run.path)
            self._run.clear_attempt()
            status, end = self._attempt(status)
            if end.state is State.COMPLETED:
                self._stop(status, State.COMPLETED, end.failure)
                return
            status = self._close_attempt(status, end)
            time.sleep(PAUSE)
        self._stop(status, *ended)

    def _why_not_again(self, status: Status) -> tuple[State, Failure | None] | None:
        """How the run ends, if it does not start (again) now."""
        if self._run.cancel_requested():
            return State.CANCELLED, None
        failure = status.failure
        if failure is not None and failure.user_error:
            return State.FAILED, failure
        if self._wishes.number is not None:
            return (State.PREEMPTED, None) if failure is None else (State.FAILED, failure)
        restarts = read_restarts(self._run)
        why = spent(restarts, self._job, since=status.first_attempt)
        if why is None:
            return None
        if failure is None:
            return State.FAILED, Failure(rank=None, type="Restarts", message=why)
        return State.FAILED, failure if why == restarts[-1].message else replace(failure, message=why)

    def _attempt(self, status: Status) -> tuple[Status, End]:
        """One start of all ranks, to its end."""
        start = status.attempt - status.first_attempt
        gang = Gang(
            self._job,
            self._run,
            start=start,
            name=f"{self._name} attempt {status.attempt + 1}",
            runtime_env=self._runtime_env,
            wishes=self._wishes,
        )
        try:
            if not gang.place():
                return status, End(state=State.PREEMPTED, cause=Cause.PREEMPTED)
            status = replace(status, attempt=status.attempt + 1, started=time.time(), failure=None, reason="")
            end = gang.locate()
            if end is None:
                # Written first: a rank that finds another start there takes itself for one given up.
                status = replace(status, state=State.RUNNING, start=start, nodes=",".join(gang.hosts))
                self._run.write_status(status)
                gang.start()
                end = gang.watch()
        finally:
            gang.close()
        return status, end

    def _close_attempt(self, status: Status, end: End) -> Status:
        """Write the end of an attempt down. Whether it starts again comes next."""
        if end.cause is not None and status.started is not None:
            add_restart(
                self._run,
                Restart.of(self._run, attempt=status.attempt, cause=end.cause, failure=end.failure),
            )
            logger.info("attempt %d: %s", status.attempt, end.cause)
        status = status.stopped(State.PENDING, failure=end.failure)
        self._run.write_status(status)
        return status

    def _stop(self, status: Status, state: State, failure: Failure | None) -> None:
        """The run ends here."""
        status = status.stopped(state, failure=failure)
        self._run.write_status(status)
        logger.info("%s%s", state, "" if failure is None else f": {failure.message}")
        notify(self._run, status)
