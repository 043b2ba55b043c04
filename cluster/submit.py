"""The one way into a run folder: who may submit there, and what a job finds when it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cluster.errors import AlreadyRunning, Refused
from cluster.executors import Executor, settled
from cluster.job import ExecutorName, Handle, Job, State
from cluster.run.folder import LOCK_PATIENCE, RunFolder
from cluster.run.notify import tell_the_untold
from cluster.run.restarts import last_attempt
from cluster.run.source import snapshot_source
from cluster.run.status import Status, why
from cluster.run.trust import refuse_untrusted
from cluster.site import write_site

OTHERS = "remove it, or have the run in another place"
SBATCH_PATIENCE = 120.0  # seconds that another submission of the same run may wait for SLURM


def submit(job: Job, executor: Executor, *, keep_source: bool = False, trust: bool = False) -> Handle:
    """Start a job, or queue it, unless its run goes on already.

    Args:
        keep_source: where the ranks run the source in the run folder: go on with the one that is there, if
            there is one.
        trust: go on in a folder that is another's, or that everybody may write.

    Raises:
        AlreadyRunning: if the run has not ended, wherever it was submitted.
        UserError: if the executor can never run such a job, or others decide on what is in its folder.
        Refused: if it does not take this one; the run's status is as it was before.
    """
    begun = job.directory if job.directory is not None and job.directory.is_dir() else Path.cwd()
    job = replace(job, folder=job.folder.absolute(), directory=begun, task=None)
    executor.refuse_impossible(job)
    if job.folder.is_dir() and not trust:
        # Its owner could put another job in the place of this one before it starts.
        refuse_untrusted(job.folder, (), groups=None, remedy=OTHERS)
    run = RunFolder.create(job.folder)
    patience = SBATCH_PATIENCE if executor.name == "slurm" else LOCK_PATIENCE
    lock = run.lock(patience=patience, of_kernel=executor.name == "ray")
    try:
        _refuse_if_it_goes_on(run, executor.name)
        tell_the_untold(run)
        before = run.status_before()
        kept = executor.name == "local" or (keep_source and (run.path / "source").is_dir())
        snapshot = None if kept else snapshot_source
        pending = prepare(run, job, executor, before, snapshot=snapshot)
        try:
            return executor.start(job, run, pending, lock)
        except Refused:
            restore(run, before)
            raise
    except BaseException:
        lock.close()
        raise


def _refuse_if_it_goes_on(run: RunFolder, here: ExecutorName) -> None:
    """Called with the run's lock, which speaks for one machine; and who waits in a queue holds none."""
    before = run.status_before()
    # The lock has answered for a run of this machine, and its name for one on Ray.
    if before is None or (here == before.executor and here != "slurm"):
        return
    status = settled(run, locked=True)
    if not status.state.ended:
        where = f"on {status.executor}{f' as {status.id}' if status.id else ''}"
        if status.state is State.UNKNOWN:
            raise AlreadyRunning(
                f"the run in {run.path} may be going on, {where}: {why(status)}; submit it from where that "
                "answers"
            )
        raise AlreadyRunning(
            f"the run in {run.path} is going on already, {where}; `submit cancel {run.path}` ends it"
        )


def prepare(
    run: RunFolder,
    job: Job,
    executor: Executor,
    before: Status | None,
    *,
    snapshot: Callable[[Path], object] | None,
) -> Status:
    """Forget how the run ended before, and write down what is to be run.

    Args:
        snapshot: puts the source into the run's folder; None: it needs none, or has one.

    Returns:
        What status.json is to say until the job has started.
    """
    run.clear_cancel()
    run.clear_attempt()
    run.unwatched.unlink(missing_ok=True)
    if snapshot is not None:
        snapshot(run.path)
    if executor.site is not None:
        write_site(executor.site, run.path / "site.yaml")
    else:  # whoever has left one there, its command is not to be called
        (run.path / "site.yaml").unlink(missing_ok=True)
    run.write_job(job)
    # A status that was damaged, and removed, has forgotten them: the ends of before shall not count again.
    attempts = last_attempt(run) if before is None else before.attempt
    return Status(
        state=State.PENDING,
        name=job.name,
        executor=executor.name,
        id="",
        ranks=job.resources.ranks,
        attempt=attempts,
        first_attempt=attempts,
        gpus=job.resources.ranks * job.resources.gpus_per_rank,
        seconds=0.0 if before is None else before.seconds,
        gpu_hours=0.0 if before is None else before.gpu_hours,
        submitted=time.time(),
    )


def restore(run: RunFolder, before: Status | None) -> None:
    """Have a run that was not taken say what it said before."""
    if before is not None:
        run.write_status(before)
    else:
        (run.path / "status.json").unlink(missing_ok=True)
