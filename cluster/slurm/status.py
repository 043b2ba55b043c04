"""What has become of a run on SLURM: for whoever looks, and for whoever is to act on it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.notify import notify
from cluster.run.status import Failure, Status, why
from cluster.slurm.script import job_name
from cluster.slurm.state import LOOK_PATIENCE, PATIENCE, Answer, Seen, ask
from cluster.small_file import read_small

# Words of SLURM's that are "pending" to us, and go on only when somebody says so.
HELD = re.compile(r"held|hold|special_exit", re.IGNORECASE)


def ask_about(runs: Sequence[RunFolder], *, patience: float = LOOK_PATIENCE) -> Answer:
    """Ask SLURM once about all runs that are not known to have ended; by default for who only looks."""
    job_ids, names = set(), set()
    for run in runs:
        try:
            status = run.read_status()
            if status.executor == "slurm" and not status.state.ended:
                if known := _checked(run, status.id) or job_id(run):
                    job_ids |= {known, watcher_id(run) or known}
                else:
                    names.add(_name_in_queue(run))
        except (OSError, UserError):  # it is told of where that run itself is looked at
            continue
    return ask(job_ids, names, patience=patience)


def current_status(run: RunFolder, *, locked: bool = False, answer: Answer | None = None) -> Status:
    """What status.json says, corrected by what SLURM says: a job that was killed writes nothing.

    A look, which leaves no trace: neither a file nor a notice.

    Args:
        locked: this process holds the run's lock.
        answer: what SLURM has said, if it was asked about this run with others.

    Raises:
        UserError: if what lies in the folder is damaged.
    """
    status = run.read_status()
    if status.state.ended:
        return status
    status = replace(status, id=_checked(run, status.id) or job_id(run))
    if not status.id and run.is_held() and not locked:
        return status  # somebody is submitting it now
    known_as = status.id or _name_in_queue(run)
    if answer is None or known_as not in answer.asked:  # it was submitted since
        answer = ask({known_as, watcher_id(run) or known_as}) if status.id else ask([], [known_as])
    if answer.silence:
        return replace(run.unheard(answer.silence), id=status.id)
    if status.id or known_as in answer.ids:
        return _as_seen(run, replace(status, id=status.id or answer.ids[known_as]), answer)
    if job_id(run):  # written since the look began
        return current_status(run, locked=locked)
    message = "it never came into SLURM's queue: sbatch did not answer"  # or the submitter has died
    failure = Failure(rank=None, type="Submission", message=f"{message}; submit it again")
    return replace(status, state=State.FAILED, failure=failure)


def _name_in_queue(run: RunFolder) -> str:
    """By which SLURM tells its job from others while nobody knows the id."""
    job = run.read_job()
    return job_name(job) if job.task is None else f"{job.task.array}_{job.task.number}"


def _as_seen(run: RunFolder, status: Status, answer: Answer) -> Status:
    seen = answer.seen.get(status.id)
    if seen is not None and not seen.state.ended:
        # Between a requeue and the next start the file says "pending" too; the reason is SLURM's.
        return replace(status, state=seen.state, reason=_reason(status.id, seen))
    written = run.read_status()  # it may have ended properly between the two looks
    if written.state.ended:
        return written
    ended = ended_without_a_word(run, status, seen)
    watcher = answer.seen.get(watcher_id(run))
    sees_to_it = watcher is not None and not watcher.state.ended
    if sees_to_it and ended.state not in (State.COMPLETED, State.CANCELLED):  # and may go on with it
        reason = f"{why(ended)}; job {watcher_id(run)} sees to it"
        return replace(status, state=State.PENDING, reason=reason)
    return ended


def settled_statuses(runs: Sequence[RunFolder], *, locked: bool = False) -> list[Status]:
    """`settled_status` of many runs, about which SLURM is asked once."""
    answer = ask_about(runs, patience=PATIENCE)
    return [settled_status(run, locked=locked, answer=answer) for run in runs]


def settled_status(run: RunFolder, *, locked: bool = False, answer: Answer | None = None) -> Status:
    """The same, and what nobody else could write is written down: the id of its job, and its end, of which
    people are told then. SLURM forgets both.

    For who submits a run, waits for it or cancels it. One who may only look just looks.
    """
    status = current_status(run, locked=locked, answer=answer)
    if not _has_news(run, status):
        return status
    try:
        with _lock(run, locked):
            status = current_status(run, locked=True)
            if _has_news(run, status):
                if status.id:
                    write_job_id(run, status.id)
                if status.state.ended:
                    _write_end(run, status)
    except (OSError, UserError):
        pass  # what is news is told all the same; who looks next writes it down
    return status


def settle(run: RunFolder, status: Status) -> None:
    """Write an end down that the job itself cannot, and tell of it, unless somebody has done so."""
    with contextlib.suppress(OSError, UserError), _lock(run, locked=False):
        written = run.read_status()
        if not written.state.ended and written.submitted == status.submitted:
            _write_end(run, status)


def _write_end(run: RunFolder, status: Status) -> None:
    status = status.stopped(status.state, failure=status.failure, at=run.last_sign())
    run.write_status(status)
    notify(run, status)


def _has_news(run: RunFolder, status: Status) -> bool:
    """Whether a look has found out what the folder does not say."""
    return not run.read_status().state.ended and (status.state.ended or job_id(run) != status.id)


@contextlib.contextmanager
def _lock(run: RunFolder, locked: bool) -> Iterator[None]:
    """Hold the run's lock, unless this process holds it already."""
    with contextlib.nullcontext() if locked else contextlib.closing(run.lock(patience=0)):
        yield


def _reason(known: str, seen: Seen) -> str:
    """Why a job waits; of one that goes on only when somebody says so, how to."""
    if seen.state is State.PENDING and (HELD.search(seen.reason) or HELD.search(seen.word)):
        return f"held: {seen.reason or seen.word}, until `scontrol release {known}`"
    return seen.reason


def ended_without_a_word(run: RunFolder, status: Status, seen: Seen | None) -> Status:
    """What is known of the end of a job that could not write it."""
    if run.cancel_requested():
        return replace(status, state=State.CANCELLED)
    if seen is None:
        message = f"SLURM knows no job {status.id} any more, and it has not written how it ended"
        return replace(status, state=State.FAILED, failure=_killed(message, None))
    failure = None
    if seen.state is not State.COMPLETED:
        error = run.first_error(start=status.token)
        failure = error or _killed(f"SLURM ended job {status.id} as {seen.word}", seen.nodes)
    return replace(status, state=seen.state, failure=failure)


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
    """SLURM's id of the run's newest job; empty while sbatch has not answered.

    Raises:
        UserError: if the file does not hold one.
    """
    return _id_in(run, job_file(run))


def watcher_file(run: RunFolder) -> Path:
    """Where SLURM's id is kept of the small job that looks how that one ends, see `cluster.slurm.watch`."""
    return run.path / "slurm-watcher"


def watcher_id(run: RunFolder) -> str:
    """That id; empty if there is no such job.

    Raises:
        UserError: if the file does not hold one.
    """
    return _id_in(run, watcher_file(run))


def _id_in(run: RunFolder, file: Path) -> str:
    if not file.is_file():
        return ""
    return _checked(run, read_small(file).decode(errors="replace").strip())


def _checked(run: RunFolder, known: str) -> str:
    """An id from a folder, before a command of SLURM's gets it: `--user=me` means all jobs of mine."""
    if known and not re.fullmatch(r"[0-9]{1,20}(_[0-9]{1,10})?", known):
        raise UserError(f"{run.path}: {known!r} is no id of a SLURM job; what lies there is damaged")
    return known
