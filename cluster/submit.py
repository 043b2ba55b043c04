"""What a job finds in its run folder when it starts, and whether it may start there."""

from __future__ import annotations

import time

from cluster.errors import AlreadyRunning
from cluster.job import ExecutorName, Job, State
from cluster.run.folder import RunFolder
from cluster.run.source import snapshot_source
from cluster.run.status import Status
from cluster.site import Site, write_site


def refuse_if_elsewhere(run: RunFolder, here: ExecutorName) -> None:
    """The lock of a run speaks for one machine, and who waits in a queue holds none: the executors know.

    Args:
        here: the executor that asks; it knows of its own runs by other means.

    Raises:
        AlreadyRunning: if the run goes on, or waits, on another executor.
    """
    from cluster.executors import status_of  # which knows of the executors that ask

    if not (run.path / "status.json").is_file() or run.read_status().executor == here:
        return
    status = status_of(run)
    if not status.state.ended:
        raise AlreadyRunning(
            f"the run in {run.path} is going on already, on {status.executor} as {status.id}; "
            f"`submit cancel {run.path}` ends it"
        )


def prepare_run(
    run: RunFolder, job: Job, *, executor: ExecutorName, known_id: str, site: Site | None, keep_source: bool
) -> Status | None:
    """Forget how the run ended before, and write down what is to be run. From the moment the job can start,
    status.json is its own.

    Args:
        known_id: the executor's name of the job, empty if it has none yet.
        site: kept with the run.
        keep_source: go on with the source that is there, if there is one.

    Returns:
        What status.json said before.
    """
    before = run.read_status() if (run.path / "status.json").is_file() else None
    run.clear_cancel()
    run.clear_attempt()
    if not (keep_source and (run.path / "source").is_dir()):
        snapshot_source(run.path)
    if site is not None:
        write_site(site, run.path / "site.yaml")
    run.write_job(job)
    run.write_status(
        Status(
            state=State.PENDING,
            name=job.name,
            executor=executor,
            id=known_id,
            ranks=job.resources.ranks,
            attempt=0 if before is None else before.attempt,
            first_attempt=0 if before is None else before.attempt,
            gpus=job.resources.ranks * job.resources.gpus_per_rank,
            seconds=0.0 if before is None else before.seconds,
            gpu_hours=0.0 if before is None else before.gpu_hours,
            submitted=time.time(),
        )
    )
    return before
