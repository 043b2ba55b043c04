"""From an executor's name to the executor, and from a run folder to whoever runs it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cluster.errors import UserError
from cluster.job import Executor, ExecutorName
from cluster.local import LocalExecutor
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from cluster.run.waiting import Stream
from cluster.site import Site

logger = logging.getLogger(__name__)


def make_executor(
    name: ExecutorName,
    site: Site,
    *,
    stream: Stream | None = None,
    exclude: Sequence[str] = (),
    keep_source: bool = False,
) -> Executor:
    """The executor of that name.

    Args:
        stream: where the local and the Ray executor repeat rank 0's output while somebody waits.
        exclude: nodes that SLURM is not to use, besides the site's.
        keep_source: on SLURM and Ray: run the source that is in the run folder, if there is one.
    """
    if name == "slurm":
        from cluster.slurm.executor import SlurmExecutor

        return SlurmExecutor(site, exclude=exclude, keep_source=keep_source)
    if name == "ray":
        from cluster.ray.executor import RayExecutor

        return RayExecutor(site.ray_address, stream=stream, site=site, keep_source=keep_source)
    return LocalExecutor(stream=stream, site=site)


def status_of(run: RunFolder) -> Status:
    """The state of a run, as true as it can be told from here."""
    match run.read_status().executor:
        case "slurm":
            from cluster.slurm.status import current_status

            return current_status(run)
        case "ray":
            from cluster.ray.status import current_status as on_ray

            return on_ray(run)
        case _:
            return run.status()


def cancel(run: RunFolder) -> None:
    """Ask a run to save and end, whatever it runs on.

    Raises:
        UserError: if it has ended already, or can be reached only from another machine.
    """
    if run.read_status().executor == "ray":
        _cancel_on_ray(run)
        return
    status = status_of(run)
    if status.state.ended:
        raise UserError(f"the run in {run.path} is not running: it is {status.state}")
    match status.executor:
        case "slurm":
            from cluster.slurm.executor import SlurmHandle

            SlurmHandle(run).cancel()
        case _:
            run.cancel()


def _cancel_on_ray(run: RunFolder) -> None:
    """Its supervisor looks for the request in the run folder: its Ray need not be reached from here."""
    from cluster.ray.executor import reopen

    if run.read_status().state.ended:
        raise UserError(f"the run in {run.path} is not running: it is {run.read_status().state}")
    run.request_cancel()
    try:
        status = status_of(run)
        if not status.state.ended:
            reopen(run).cancel()
    except UserError as error:
        logger.warning("%s; the run was asked through its folder", error)
        return
    if status.state.ended:
        raise UserError(f"the run in {run.path} is not running: it is {status.state}")
