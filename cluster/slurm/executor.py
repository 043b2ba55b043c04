"""Run a job on SLURM: sbatch takes its script, and SLURM is the truth about what runs.

The script does little: `cluster.slurm.batch` decides before and after the ranks, in Python.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, ClassVar

from cluster.atomic_file import write_atomically
from cluster.errors import Refused, UserError
from cluster.job import ExecutorName, Job, State
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from cluster.site import Site
from cluster.slurm.command import call, id_in
from cluster.slurm.script import Array, asked_for, render, script_file
from cluster.slurm.state import PATIENCE
from cluster.slurm.status import (
    ask_about,
    current_status,
    job_file,
    job_id,
    settle,
    settled_status,
    write_job_id,
)
from cluster.slurm.watch import end_watch, set_watch

POLL_SECONDS = 2.0
# SLURM's names for limits of waiting jobs, such as AssocMaxSubmitJobLimit and QOSMaxSubmitJobPerUserLimit.
_SUBMITTED_ENOUGH = re.compile(r"\b(Assoc|QOS)\w*Submit\w*Limit")
ENDED_ALREADY = re.compile(r"already complet|invalid job id", re.IGNORECASE)


@dataclass(frozen=True)
class SlurmExecutor:
    """Submits to the SLURM of this machine's configuration.

    Attributes:
        site: the cluster's facts.
        exclude: nodes not to use, besides the site's.
        after: ids of jobs that must complete first; if one fails, the job is cancelled.
        watched: whether somebody outside is to look how the job ends, see `cluster.slurm.watch`.
    """

    name: ClassVar[ExecutorName] = "slurm"
    site: Site
    exclude: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    watched: bool = False

    def refuse_impossible(self, job: Job) -> None:
        """Ask SLURM whether such a job could ever run.

        Raises:
            UserError: if there is no SLURM here, it could not, or SLURM takes no more jobs of this user now.
        """
        if shutil.which("sbatch") is None:
            raise UserError(
                "there is no sbatch here: submit from a machine that has SLURM, or use --executor local; "
                "--dry-run shows the script"
            )
        script = self._script(job)
        tested = call(["sbatch", "--test-only"], text=script)
        if "contact slurm controller" in tested.stderr.lower():
            raise UserError(
                f"SLURM's controller cannot be reached from here: {_message(tested.stderr)}; to run on this "
                "machine, say --executor local"
            )
        if tested.returncode != 0 and _SUBMITTED_ENOUGH.search(tested.stderr):
            raise UserError(
                f"SLURM takes no more of your jobs for now: {_message(tested.stderr)}; give the same command "
                "again when some of those in `squeue --me` have ended"
            )
        if tested.returncode != 0:
            raise UserError(
                f"SLURM would never run this job: {_message(tested.stderr)}; see `sinfo` for what there is; "
                f"asked for was {asked_for(script)}"
            )

    def start(self, job: Job, run: RunFolder, pending: Status, lock: IO[str]) -> SlurmHandle:
        """Queue the job.

        Raises:
            Refused: by SLURM.
            UserError: if sbatch does not answer; the job may be in the queue all the same.
        """
        with contextlib.closing(lock):
            script = script_file(job)
            write_atomically(script, self._script(job), private=True)  # the site's environment is in it
            job_file(run).unlink(missing_ok=True)
            end_watch(run)  # of the job before
            run.write_status(pending)
            submitted = call(["sbatch", "--parsable", str(script)])
            if submitted.returncode != 0:
                raise Refused(f"SLURM refused {job.name}: {_message(submitted.stderr)}")
            write_job_id(run, id_in(submitted.stdout))
            if self.watched:
                set_watch(run, job_id(run))
        return SlurmHandle(run)

    def start_array(self, jobs: Sequence[Job], array: Array) -> None:
        """Queue jobs as tasks of one array; their statuses are written, and their runs' locks held.

        Raises:
            Refused: by SLURM: none of them will run.
            UserError: if sbatch does not answer; they may be in the queue all the same.
        """
        script = script_file(jobs[0])
        write_atomically(script, self._script(jobs[0], array), private=True)
        submitted = call(["sbatch", "--parsable", str(script)])
        if submitted.returncode != 0:
            raise Refused(f"SLURM refused {array.name}: {_message(submitted.stderr)}")
        known = id_in(submitted.stdout)
        for job in jobs:
            assert job.task is not None
            write_job_id(RunFolder(job.folder), f"{known}_{job.task.number}")

    def _script(self, job: Job, array: Array | None = None) -> str:
        return render(job, self.site, after=self.after, exclude=self.exclude, array=array)


class SlurmHandle:
    """A job that SLURM knows."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    @property
    def id(self) -> str:
        """SLURM's job id."""
        return job_id(self._run)

    @property
    def detached(self) -> bool:
        """SLURM needs nobody here."""
        return True

    def state(self) -> State:
        """Where the job is now."""
        return settled_status(self._run).state

    def wait(self) -> State:
        """Block until the job has ended for good."""
        while not (state := self.state()).ended:
            time.sleep(POLL_SECONDS)
        return state

    def cancel(self) -> None:
        """Ask a running job to save and end; take a waiting one out of the queue."""
        cancel_jobs([self._run])


def cancel_jobs(runs: Sequence[RunFolder]) -> None:
    """Ask the jobs of runs to save and end, those that run; take those that wait out of the queue.

    Raises:
        UserError: if SLURM does not do so.
    """
    for run in runs:
        run.request_cancel()
    answer = ask_about(runs, patience=PATIENCE)
    statuses = [(run, current_status(run, answer=answer)) for run in runs]
    going = [(run, status) for run, status in statuses if status.id and not status.state.ended]
    waiting = [(run, status) for run, status in going if status.state is State.PENDING]
    running = [status.id for _, status in going if status.state is not State.PENDING]
    # Of a running one the ranks alone: the batch script is to see how they end.
    for options, jobs in ([], [status.id for _, status in waiting]), (["--signal=TERM"], running):
        done = call(["scancel", *options, *jobs]) if jobs else None
        if done is not None and done.returncode != 0 and not ENDED_ALREADY.search(done.stderr):
            for run in runs:
                run.clear_cancel()  # or it would end, some day, when nobody thinks of it any more
            raise UserError(
                f"not cancelled: SLURM does not cancel job {', '.join(jobs)}: {_message(done.stderr)}; try "
                "again when it answers"
            )
    for run, status in waiting:
        settle(run, replace(status, state=State.CANCELLED, reason=""))
        end_watch(run)


def array_limit() -> int:
    """The first number that a task of an array may not have here.

    Raises:
        UserError: if SLURM does not answer.
    """
    answer = call(["scontrol", "show", "config"])
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer.stdout, re.MULTILINE)
    if answer.returncode != 0 or found is None:
        raise UserError(f"SLURM does not say how large arrays may be: {_message(answer.stderr)}")
    return int(found[1])


def _message(stderr: str) -> str:
    """SLURM's complaint, without its decoration."""
    lines = [re.sub(r"^(sbatch|allocation failure): (error: )?", "", line) for line in stderr.splitlines()]
    return "; ".join(line.removeprefix("allocation failure: ") for line in lines if line) or "no reason given"
