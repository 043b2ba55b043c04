"""Run a job on SLURM: sbatch takes its script, and SLURM is the truth about what runs.

The script does little: `cluster.slurm.batch` decides before and after the ranks, in Python.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from dataclasses import dataclass, replace
from typing import IO, ClassVar

from cluster.atomic_file import write_atomically
from cluster.errors import Refused, UserError
from cluster.job import ExecutorName, Job, State
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from cluster.site import Site
from cluster.slurm.command import call
from cluster.slurm.script import asked_for, render
from cluster.slurm.status import current_status, job_file, job_id, settle, settled_status, write_job_id

POLL_SECONDS = 2.0


@dataclass(frozen=True)
class SlurmExecutor:
    """Submits to the SLURM of this machine's configuration.

    Attributes:
        site: the cluster's facts.
        exclude: nodes not to use, besides the site's.
        after: ids of jobs that must complete first; if one fails, the job is cancelled.
    """

    name: ClassVar[ExecutorName] = "slurm"
    site: Site
    exclude: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def refuse_impossible(self, job: Job) -> None:
        """Ask SLURM whether such a job could ever run.

        Raises:
            UserError: if there is no SLURM here, or it could not.
        """
        if shutil.which("sbatch") is None:
            raise UserError(
                "there is no sbatch here: submit from a machine that has SLURM, or use --executor local; "
                "--dry-run shows the script"
            )
        script = self._script(job)
        tested = call(["sbatch", "--test-only"], text=script)
        if "contact slurm controller" in tested.stderr.lower():
            raise UserError(f"SLURM's controller cannot be reached from here: {_message(tested.stderr)}")
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
            script = run.path / "job.sbatch"
            write_atomically(script, self._script(job), private=True)  # the site's environment is in it
            job_file(run).unlink(missing_ok=True)
            run.write_status(pending)
            submitted = call(["sbatch", "--parsable", str(script)])
            if submitted.returncode != 0:
                raise Refused(f"SLURM refused {job.name}: {_message(submitted.stderr)}")
            write_job_id(run, _id_in(submitted.stdout))
        return SlurmHandle(run)

    def _script(self, job: Job) -> str:
        return render(job, self.site, after=self.after, exclude=self.exclude)


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
        self._run.request_cancel()
        status = current_status(self._run)
        waits = status.state is State.PENDING
        # Of a running one the ranks alone: the batch script is to see how they end.
        answer = call(["scancel", *([] if waits else ["--signal=TERM"]), status.id])
        if answer.returncode != 0:
            raise UserError(f"SLURM does not cancel job {status.id}: {_message(answer.stderr)}")
        if waits:
            settle(self._run, replace(status, state=State.CANCELLED))


def _id_in(stdout: str) -> str:
    """The id among what `sbatch --parsable` says: at some sites it is a wrapper that says more.

    Raises:
        UserError: if there is none.
    """
    ids = re.findall(r"^\s*(\d+)(?:;\S+)?\s*$", stdout, re.MULTILINE)
    if not ids:
        raise UserError(
            f"sbatch took the job and named no id, but {stdout.strip()!r:.300}: see `squeue --me`, cancel it "
            "there, and have a wrapper of sbatch hand on what --parsable asks for"
        )
    return str(ids[-1])


def _message(stderr: str) -> str:
    """SLURM's complaint, without its decoration."""
    lines = [re.sub(r"^(sbatch|allocation failure): (error: )?", "", line) for line in stderr.splitlines()]
    return "; ".join(line.removeprefix("allocation failure: ") for line in lines if line) or "no reason given"
