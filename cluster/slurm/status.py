"""What has become of a run on SLURM, for whoever looks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.notify import notify
from cluster.run.status import Failure, Status
from cluster.slurm.script import job_name
from cluster.slurm.state import NoAnswerError, Seen, find_job, find_state


def current_status(run: RunFolder, *, locked: bool = False) -> Status:
    """What status.json says, corrected by what SLURM says: a job that was killed writes nothing.

    Args:
        locked: this process holds the run's lock.
    """
    status = run.read_status()
    if status.state.ended:
        return status
    status = replace(status, id=status.id or job_id(run))
    if not status.id:
        return _adopt(run, status, locked=locked)
    try:
        seen = find_state(status.id)
    except NoAnswerError:
        return replace(status, reason="SLURM does not answer")
    if seen is not None and not seen.state.ended:
        # Between a requeue and the next start the file says "pending" too; the reason is SLURM's.
        return replace(status, state=seen.state, reason=seen.reason)
    written = run.read_status()  # it may have ended properly between the two looks
    if written.state.ended:
        return written
    return settle(run, _ended_without_a_word(run, status, seen), locked=locked)


def _adopt(run: RunFolder, status: Status, *, locked: bool) -> Status:
    """The status of a job whose id nobody wrote down: sbatch has not answered, or the submitter has died."""
    try:
        with _lock(run, locked):  # nobody is submitting it now
            known = job_id(run)
            if not known:
                known = find_job(job_name(run.read_job())) or ""
            if known:
                write_job_id(run, known)
                return replace(status, id=known)
    except (OSError, UserError, NoAnswerError):
        return status
    message = "it never came into SLURM's queue: sbatch did not answer"
    failure = Failure(rank=None, type="Submission", message=f"{message}; submit it again")
    return settle(run, replace(status, state=State.FAILED, failure=failure), locked=locked)


@contextlib.contextmanager
def _lock(run: RunFolder, locked: bool) -> Iterator[None]:
    """Hold the run's lock, unless this process holds it already."""
    with contextlib.nullcontext() if locked else contextlib.closing(run.lock(patience=0)):
        yield


def _ended_without_a_word(run: RunFolder, status: Status, seen: Seen | None) -> Status:
    if run.cancel_requested():
        return replace(status, state=State.CANCELLED)
    if seen is None:
        message = f"SLURM knows no job {status.id} any more, and it has not written how it ended"
        return replace(status, state=State.FAILED, failure=_killed(message, None))
    failure = None
    if seen.state is not State.COMPLETED:
        error = run.first_error(start=f"{status.id}.{status.start}")
        failure = error or _killed(f"SLURM ended job {status.id} as {seen.word}", seen.nodes)
    return replace(status, state=seen.state, failure=failure)


def settle(run: RunFolder, status: Status, *, locked: bool) -> Status:
    """Write an end down that the job itself could not, and tell of it: SLURM will forget.

    The first who sees it does so; somebody who may only look just looks.
    """
    try:
        with _lock(run, locked):
            written = run.read_status()
            if written.state.ended or written.submitted != status.submitted:
                return written
            status = status.stopped(status.state, failure=status.failure, at=run.last_sign())
            run.write_status(status)
            notify(run, status)
    except (OSError, UserError):
        pass
    return status


def _killed(message: str, node: str | None) -> Failure:
    return Failure(
        rank=None,
        type="Killed",
        message=f"{message}; `submit resume` goes on from the last checkpoint",
        node=node,
    )


def job_file(run: RunFolder) -> Path:
    """Where SLURM's id of the run's newest job is kept."""
    return run.path / "slurm-job"


def write_job_id(run: RunFolder, known: str) -> None:
    """Keep the id that sbatch has given."""
    write_atomically(job_file(run), known + "\n")


def job_id(run: RunFolder) -> str:
    """SLURM's id of the run's newest job; empty while sbatch has not answered."""
    return job_file(run).read_text().strip() if job_file(run).is_file() else ""
