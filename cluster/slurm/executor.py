"""Run a job on SLURM: submitit renders the script, sbatch takes it, and SLURM is the truth about what runs.

The script does little: `cluster.slurm.batch` decides before and after the ranks, in Python.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cluster.atomic_file import write_atomically
from cluster.errors import AlreadyRunning, UserError
from cluster.job import Job, State
from cluster.run.folder import RunFolder
from cluster.site import Site
from cluster.slurm.command import call
from cluster.slurm.script import render
from cluster.slurm.status import _current_status, _settle, current_status, job_id
from cluster.submit import prepare_run

POLL_SECONDS = 2.0
SUBMISSION_PATIENCE = 120.0  # seconds for another submission of the same run


class SlurmExecutor:
    """Submits to the SLURM of this machine's configuration.

    Args:
        site: the cluster's facts.
        exclude: nodes not to use, besides the site's.
        keep_source: go on with the source that a run was first submitted with, where it has one.
    """

    def __init__(self, site: Site, *, exclude: Sequence[str] = (), keep_source: bool = False) -> None:
        self._site = site
        self._exclude = tuple(exclude)
        self._keep_source = keep_source

    def submit(self, job: Job, *, after: Sequence[str] = ()) -> SlurmHandle:
        """Queue a job; see `render` for the arguments.

        Raises:
            UserError: if there is no SLURM here, it can never run such a job, or the run is going on.
        """
        if shutil.which("sbatch") is None:
            raise UserError(
                "there is no sbatch here: submit from a machine that has SLURM, or use --executor local; "
                "--dry-run shows the script"
            )
        job = replace(job, folder=job.folder.absolute())
        run = RunFolder.create(job.folder)
        with contextlib.closing(run.lock(patience=SUBMISSION_PATIENCE)):
            if _goes_on(run):
                status = run.read_status()
                known = status.id or job_id(run)
                raise AlreadyRunning(
                    f"the run in {run.path} is going on already, on {status.executor} as {known}; "
                    f"`submit cancel {run.path}` ends it"
                )
            script = render(job, self._site, after=after, exclude=self._exclude)
            path = run.path / "job.sbatch"
            write_atomically(path, script)
            _refuse_impossible(path)
            (run.path / "slurm-job").unlink(missing_ok=True)
            before = prepare_run(
                run, job, executor="slurm", known_id="", site=self._site, keep_source=self._keep_source
            )
            submitted = call(["sbatch", "--parsable", str(path)])
            if submitted.returncode != 0:
                if before is None:
                    (run.path / "status.json").unlink()
                else:
                    run.write_status(before)
                raise UserError(f"SLURM refused {job.name}: {_message(submitted.stderr)}")
            write_atomically(run.path / "slurm-job", submitted.stdout.strip().partition(";")[0] + "\n")
        return SlurmHandle(run)


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
        return current_status(self._run).state

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
            _settle(self._run, replace(status, state=State.CANCELLED), locked=False)


def _goes_on(run: RunFolder) -> bool:
    """Whether the run has not ended, wherever it was submitted. Called with its lock."""
    from cluster.executors import status_of  # which knows of this executor

    if not (run.path / "status.json").is_file():
        return False
    status = run.read_status()
    status = _current_status(run, locked=True) if status.executor == "slurm" else status_of(run)
    return not status.state.ended


def _refuse_impossible(script: Path) -> None:
    """Ask SLURM whether such a job could ever run."""
    tested = call(["sbatch", "--test-only", str(script)])
    if "contact slurm controller" in tested.stderr.lower():
        raise UserError(f"SLURM's controller cannot be reached from here: {_message(tested.stderr)}")
    if tested.returncode != 0:
        raise UserError(
            f"SLURM would never run this job: {_message(tested.stderr)}; see `sinfo` for what there is, "
            f"and {script} for what was asked"
        )


def _message(stderr: str) -> str:
    """SLURM's complaint, without its decoration."""
    lines = [re.sub(r"^(sbatch|allocation failure): (error: )?", "", line) for line in stderr.splitlines()]
    return "; ".join(line.removeprefix("allocation failure: ") for line in lines if line) or "no reason given"
