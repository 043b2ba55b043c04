"""What an executor is; from its name to it, and from a run folder to whoever runs it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import IO, TYPE_CHECKING, Protocol

from cluster.errors import UserError
from cluster.job import ExecutorName, Handle, Job
from cluster.local import LocalExecutor
from cluster.run.folder import RunFolder
from cluster.run.notify import tell_the_untold
from cluster.run.status import Status
from cluster.run.waiting import Stream
from cluster.site import Site

if TYPE_CHECKING:
    from cluster.ray.connect import Reached
    from cluster.slurm.state import Answer

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """Starts the ranks of jobs somewhere. Whether they may start is for `cluster.submit` to say."""

    @property
    def name(self) -> ExecutorName:
        """Which one it is."""

    @property
    def site(self) -> Site | None:
        """The cluster's facts, as far as they are known."""

    def refuse_impossible(self, job: Job) -> None:
        """Look before anything is written.

        Raises:
            UserError: if it is not here, or could never run such a job.
            AlreadyRunning: if it knows that the run goes on.
        """

    def start(self, job: Job, run: RunFolder, pending: Status, lock: IO[str]) -> Handle:
        """Start the ranks of a job, or queue it.

        Args:
            run: the job's folder, ready for it.
            pending: its status until it has started. From the moment the job can start, status.json is its
                own: what is known before is written before.
            lock: the run's. It is to be held, or shared, while this machine has a part in the run, and then
                closed.

        Raises:
            Refused: if the job is not taken: nothing of it will run.
        """


def make_executor(
    name: ExecutorName, site: Site, *, stream: Stream | None = None, exclude: Sequence[str] = ()
) -> Executor:
    """The executor of that name.

    Args:
        stream: where the local and the Ray executor repeat rank 0's output while somebody waits.
        exclude: nodes that SLURM is not to use, besides the site's.
    """
    match name:
        case "slurm":
            from cluster.slurm.executor import SlurmExecutor

            return SlurmExecutor(site, exclude=tuple(exclude), watched=True)
        case "ray":
            from cluster.ray.executor import RayExecutor

            return RayExecutor(site.ray_address, stream=stream, site=site)
        case "local":
            return LocalExecutor(stream=stream, site=site)


class Look:
    """One look at any number of runs: whoever knows of them is asked once about all, and waited for once.

    Nothing is written, nobody told, and no address asked that lies in a folder.
    """

    def __init__(self, runs: Sequence[RunFolder]) -> None:
        self._runs = runs

    def status(self, run: RunFolder) -> Status:
        """The state of one of them, as true as a look can tell; "unknown" if who would know does not answer.

        Raises:
            UserError: if what lies in its folder is damaged.
        """
        status = run.read_status()
        match status.executor:
            case _ if status.state.ended:
                return status
            case "slurm":
                from cluster.slurm.status import current_status

                return current_status(run, answer=self._slurm)
            case "ray":
                from cluster.ray.status import current_status as on_ray

                return on_ray(run, reach=lambda: self._ray)
            case "local":
                return run.status()

    @cached_property
    def _slurm(self) -> Answer:
        from cluster.slurm.status import ask_about

        return ask_about(self._runs)

    @cached_property
    def _ray(self) -> Reached:
        from cluster.ray.connect import reach_users_ray

        return reach_users_ray()


def status_of(run: RunFolder) -> Status:
    """The state of one run, by a look at it alone.

    Raises:
        UserError: if what lies there is damaged.
    """
    return Look([run]).status(run)


def settled(run: RunFolder, *, locked: bool = False) -> Status:
    """The same for who is to act on the run: an end that nobody could write is written, and people are told.

    Args:
        locked: this process holds the run's lock.
    """
    match run.read_status().executor:
        case "slurm":
            from cluster.slurm.status import settled_status

            return settled_status(run, locked=locked)
        case "ray":
            from cluster.ray.status import current_status as on_ray

            return on_ray(run, locked=locked)
        case "local":
            return run.status()


def cancel(run: RunFolder) -> None:
    """Ask a run to save and end, whatever it runs on.

    Raises:
        UserError: if it has ended already, or can be reached only from another machine.
    """
    tell_the_untold(run)
    match run.read_status().executor:
        case "slurm":
            from cluster.slurm.executor import SlurmHandle

            _refuse_ended(run, settled(run))
            SlurmHandle(run).cancel()
        case "ray":
            _cancel_on_ray(run)
        case "local":
            run.cancel()


def _cancel_on_ray(run: RunFolder) -> None:
    """Its supervisor looks for the request in the run folder: its Ray need not be reached from here."""
    from cluster.ray.executor import reopen
    from cluster.ray.status import asked_status

    _refuse_ended(run, run.read_status())
    run.request_cancel()
    try:
        status = asked_status(run)
        if not status.state.ended:
            reopen(run).cancel()
    except UserError as error:
        logger.warning("%s; the run was asked through its folder", error)
        return
    _refuse_ended(run, status)


def _refuse_ended(run: RunFolder, status: Status) -> None:
    if status.state.ended:
        raise UserError(f"the run in {run.path} is not running: it is {status.state}")
