"""Run a job on SLURM: submitit renders the script, sbatch takes it, and SLURM is the truth about what runs.

The script does little: `cluster.slurm_batch` decides before and after the ranks, in Python.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.doctor import MALLOC_SETTINGS
from cluster.errors import AlreadyRunning, UserError
from cluster.job import Job, State, write_atomically
from cluster.notify import notify
from cluster.rank_process import OPENMP_SETTINGS
from cluster.runs import Failure, RunFolder, Status
from cluster.site import Site, write_site
from cluster.slurm_state import NoAnswerError, Seen, find_state, has_job_named
from cluster.source import snapshot_source

COMMAND_PATIENCE = 60  # seconds for one call of a SLURM command
POLL_SECONDS = 2.0
SUBMISSION_PATIENCE = 120.0  # seconds for another submission of the same run
NOTHING_TO_DO = 3  # exit status of `cluster.slurm_batch begin`: the run is complete already
# Of an enclosing job or rank: in a new job they would lie. SLURM_CONF says where the cluster is, and stays.
# SBATCH_ variables go before the script's own options: what --dry-run prints would not be what runs.
INHERITED = re.compile(r"(SLURM_(?!CONF$)|SBATCH_|SRUN_|SUBMITIT_|PMI|CUDA_VISIBLE_DEVICES$|SUBMIT_START$).*")
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def render(job: Job, site: Site, *, after: Sequence[str] = (), exclude: Sequence[str] = ()) -> str:
    """The batch script of a job. Needs no SLURM here.

    Args:
        job, site: what runs, where.
        after: ids of jobs that must complete first; if one fails, this one is cancelled.
        exclude: nodes not to use, besides the site's.
    """
    named = [site.partition, site.account, site.qos, site.constraint]
    refuse_line_breaks([job.folder, *after, *exclude, *site.exclude, *site.sbatch.values(), *named])
    # The renderer is what the public class calls, and the class cannot be had without srun on this machine.
    from submitit.slurm.slurm import _make_sbatch_string

    wants = job.resources
    options: dict[str, Any] = dict(site.sbatch) | {"requeue": True}
    # Equal names in a row: a second submission of the same work waits, and then finds it done.
    dependencies = [f"afterok:{':'.join(after)}"] if after else []
    options["dependency"] = ",".join([*dependencies, "singleton"])
    options["kill-on-invalid-dep"] = "yes"
    gpus = wants.gpus_per_rank * wants.ranks_per_node
    minutes = wants.minutes or site.minutes
    cpus = wants.cpus_per_rank or site.cpus_per_rank
    # Wait for ever: rank 0 may have much to do when the others are done. Who hangs, the watchdog ends.
    ranks = ["--kill-on-bad-exit=1", "--wait=0", "--export=ALL", "--open-mode=append"]
    ranks += ["--output", pattern(job.folder / "logs") + "/rank-%t.log"]
    ranks += [f"--cpus-per-task={cpus}"] if cpus is not None else []  # srun does not take it from the job
    if site.container is not None:
        ranks += [
            f"--container-image={site.container}",
            f"--container-mounts={','.join([str(job.folder), *site.container_mounts])}",
        ]
    text: str = _make_sbatch_string(
        command=shlex.join([sys.executable, "-m", "cluster.rank", str(job.folder / "job.json")]),
        folder=job.folder / "logs",
        job_name=job.name,
        partition=site.partition,
        account=site.account,
        qos=site.qos,
        constraint=site.constraint,
        exclude=",".join([*site.exclude, *exclude]) or None,
        nodes=wants.nodes,
        ntasks_per_node=wants.ranks_per_node,
        cpus_per_task=cpus,
        gpus_per_node=gpus or None,
        mem=None if site.memory_gb is None else f"{site.memory_gb}G",
        signal_delay_s=site.signal_seconds,
        wckey="",
        stderr_to_stdout=True,
        setup=_setup(job, site),
        teardown=["trap '' TERM USR2", f"{_batch('end', job)} --status $status ${{stopped:+--stopped}}"],
        srun_args=ranks,
        additional_parameters=options | {"output": pattern(job.folder / "logs") + "/slurm.log"},
        time=minutes or 0,
    )
    unwanted = ("#SBATCH --wckey", "#SBATCH --time=0")  # submitit has no way to leave these to the site
    lines = [line for line in text.splitlines() if not line.startswith(unwanted)]
    command = next(index for index, line in enumerate(lines) if line.startswith("srun "))
    lines.insert(command + 1, "status=$?")
    return "\n".join(lines) + "\n"


def _setup(job: Job, site: Site) -> list[str]:
    """What the script does before the ranks start."""
    lines = ["trap '' TERM USR2"]  # what is ignored stays ignored in the commands below
    lines += [f"module load {shlex.quote(module)}" for module in site.modules]
    settings = dict(site.environment) | {"PYTHONUNBUFFERED": "1"}
    if job.resources.gpus_per_rank == 0:
        settings = MALLOC_SETTINGS | OPENMP_SETTINGS | settings
    # The run's own source, and not what happens to lie in the working directory.
    settings |= {"PYTHONPATH": str(job.folder / "source"), "PYTHONSAFEPATH": "1"}
    lines += [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    if (cpus := job.resources.cpus_per_rank or site.cpus_per_rank) is not None:
        lines.append(f"export OMP_NUM_THREADS={cpus}")
    lines += [
        "export SUBMIT_START=${SLURM_RESTART_COUNT:-0}",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + SUBMIT_START) % 12000))",
        _batch("begin", job),
        f"case $? in 0) ;; {NOTHING_TO_DO}) exit 0 ;; *) exit 1 ;; esac",
        "# Only noted: this shell is to look at how the ranks end.",
        "trap 'stopped=1' TERM; trap : USR2",
    ]
    return lines


def _batch(moment: str, job: Job) -> str:
    return shlex.join([sys.executable, "-m", "cluster.slurm_batch", moment, str(job.folder)])


def pattern(folder: Path) -> str:
    """A path for sbatch and srun, to which % begins a replacement."""
    return str(folder).replace("%", "%%")


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
                raise AlreadyRunning(
                    f"the run in {run.path} is going on already, as job {job_id(run)}; "
                    f"`submit cancel {run.path}` ends it"
                )
            script = render(job, self._site, after=after, exclude=self._exclude)
            path = run.path / "job.sbatch"
            write_atomically(path, script)
            _refuse_impossible(path)
            before = self._prepare(run, job)
            submitted = call(["sbatch", "--parsable", str(path)])
            if submitted.returncode != 0:
                if before is None:
                    (run.path / "status.json").unlink()
                else:
                    run.write_status(before)
                raise UserError(f"SLURM refused {job.name}: {_message(submitted.stderr)}")
            write_atomically(run.path / "slurm-job", submitted.stdout.strip().partition(";")[0] + "\n")
        return SlurmHandle(run)

    def _prepare(self, run: RunFolder, job: Job) -> Status | None:
        """Everything that the job will find; from the moment sbatch returns, status.json is the job's.

        Returns:
            What status.json said before.
        """
        run.clear_cancel()
        run.clear_attempt()
        (run.path / "slurm-job").unlink(missing_ok=True)
        if not (self._keep_source and (run.path / "source").is_dir()):
            snapshot_source(run.path)
        write_site(self._site, run.path / "site.yaml")
        run.write_job(job)
        before = run.read_status() if (run.path / "status.json").is_file() else None
        run.write_status(
            Status(
                state=State.PENDING,
                name=job.name,
                executor="slurm",
                id="",
                ranks=job.resources.ranks,
                attempt=0 if before is None else before.attempt,
                first_attempt=0 if before is None else before.attempt,
                gpus=job.resources.ranks * job.resources.gpus_per_rank,
                gpu_hours=0.0 if before is None else before.gpu_hours,
                submitted=time.time(),
            )
        )
        return before


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
            _settle(self._run, replace(status, state=State.CANCELLED))


def current_status(run: RunFolder) -> Status:
    """What status.json says, corrected by what SLURM says: a job that was killed writes nothing."""
    status = run.read_status()
    status = replace(status, id=status.id or job_id(run))
    if status.state.ended or not status.id:  # without an id, sbatch has not answered yet
        return status
    try:
        seen = find_state(status.id)
    except NoAnswerError:
        return replace(status, reason="SLURM does not answer")
    if seen is not None and not seen.state.ended:
        # Between a requeue and the next start the file says "pending" too; the reason is SLURM's.
        return replace(status, state=seen.state, reason=seen.reason)
    written = run.read_status()  # it may have ended properly between the two looks
    return written if written.state.ended else _settle(run, _ended_without_a_word(run, status, seen))


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


def _settle(run: RunFolder, status: Status) -> Status:
    """Write an end down that the job itself could not, and tell of it: SLURM will forget.

    The first who sees it does so; somebody who may only look just looks.
    """
    try:
        with contextlib.closing(run.lock(patience=0)):
            written = run.read_status()
            if written.state.ended:
                return written
            status = status.stopped(status.state, failure=status.failure)
            run.write_status(status)
            notify(run, status)
    except (OSError, UserError):
        pass
    return status


def _goes_on(run: RunFolder) -> bool:
    """Whether the run has not ended, wherever it was submitted. Called with its lock."""
    from cluster.executors import status_of  # which knows of this executor

    if not (run.path / "status.json").is_file():
        return False
    status = status_of(run)
    if status.executor == "slurm" and not status.id:  # whoever submitted it died of it
        return has_job_named(status.name)
    return not status.state.ended


def _killed(message: str, node: str | None) -> Failure:
    return Failure(
        rank=None,
        type="Killed",
        message=f"{message}; `submit resume` goes on from the last checkpoint",
        node=node,
    )


def job_id(run: RunFolder) -> str:
    """SLURM's id of the run's newest job, as sbatch gave it; empty while it has not answered."""
    path = run.path / "slurm-job"
    return path.read_text().strip() if path.is_file() else ""


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


def call(command: list[str], *, text: str = "") -> subprocess.CompletedProcess[str]:
    """One SLURM command, with nothing of an enclosing job in its environment, and `text` to read.

    Raises:
        UserError: if there is no such command, or it does not answer.
    """
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_PATIENCE,
            env=clean_environment(os.environ),
            input=text,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]} does not answer: {error}") from error


def refuse_line_breaks(values: Sequence[object]) -> None:
    """An #SBATCH line is a comment to the shell, and ends with the line.

    Raises:
        UserError: if one of the values would end it early.
    """
    for value in values:
        if re.search(r"[\n\r\0]", str(value)):
            raise UserError(f"{str(value)!r} has a line break in it, and cannot stand in a batch script")


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what an enclosing job or rank has set for itself."""
    return {
        name: value
        for name, value in environment.items()
        if name not in PLACES and not INHERITED.fullmatch(name)
    }
