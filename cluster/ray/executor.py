"""Run a job on Ray: on a cluster that is there, on one started in a SLURM allocation, or on this machine.

A supervisor actor sees the run through (`cluster.ray.supervisor`); each rank is a process that an actor
watches (`cluster.ray.rank_worker`). The run folder must be on a file system that all nodes share.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import IO, Any, ClassVar

from cluster.errors import AlreadyRunning, UserError
from cluster.job import ExecutorName, Job, State
from cluster.ray.connect import (
    NAMESPACE,
    OWN,
    detached,
    first_line,
    join,
    load_ray,
    rejoin,
    start_here,
    write_submission,
)
from cluster.ray.gang import bundle_of, cpus_per_rank
from cluster.ray.in_allocation import AllocationRay, demand_a_token
from cluster.ray.map import map_items
from cluster.ray.rank_worker import share_lock
from cluster.ray.status import actor_name, find_supervisor, status_on_joined
from cluster.ray.supervisor import Supervisor
from cluster.run.folder import RunFolder
from cluster.run.source import PACKAGES
from cluster.run.status import Failure, Status
from cluster.run.waiting import Echo, Stream, signals_passed_on
from cluster.site import Site

_CONNECTING = threading.Lock()
POLL_SECONDS = 0.5
MAP_RETRIES = 20  # of an item whose worker or node was lost
PATIENCE = 10.0  # seconds that a supervisor may take to go after its last word


class RayExecutor:
    """Submits to Ray.

    Args:
        address: of an existing cluster, as `ray.init` takes it; None: RAY_ADDRESS, else inside a SLURM
            allocation a cluster on its nodes, else one on this machine. The last two end with this process.
        stream: where rank 0's output is repeated while somebody waits.
        site: the cluster's facts: the ranks' environment, and who is told of the end.
    """

    name: ClassVar[ExecutorName] = "ray"

    def __init__(
        self, address: str | None = None, *, stream: Stream | None = None, site: Site | None = None
    ) -> None:
        self.site = site
        self._address = address
        self._stream = stream

    def refuse_impossible(self, job: Job) -> None:
        """Join the cluster, or start one, and ask it.

        Raises:
            AlreadyRunning: if the run's supervisor is there.
            UserError: if there is no Ray, or this one can never run the job.
        """
        self._connect()
        if not detached():
            _refuse_what_cannot_fit(job)
        _refuse_second(RunFolder(job.folder))

    def start(self, job: Job, run: RunFolder, pending: Status, lock: IO[str]) -> RayHandle:
        """Start the run's supervisor. On an existing cluster it needs this process no more; on a Ray of our
        own the caller has to `wait()`: the handle's `detached` tells.
        """
        name = actor_name(run.path)
        write_submission(run, self._address or os.environ.get("RAY_ADDRESS"))
        run.write_status(replace(pending, id=name))
        lock.close()
        with contextlib.closing(share_lock(run)):  # until the supervisor has its own share
            handle = RayHandle(run, name, stream=self._stream)
            _start_supervisor(run, name, self._runtime_env(job.function, run.path))
        return handle

    def map(
        self,
        function: str,
        items: Iterable[Any],
        *,
        in_flight: int,
        retries: int = MAP_RETRIES,
        cpus: float = 1,
    ) -> Iterator[tuple[int, Any]]:
        """Call a function once for each item, on the cluster's workers.

        Args:
            function: "package.module:function" of one JSON value, returning another.
            items: read as they are needed, never as a whole.
            in_flight: the most items that are out at a time.
            retries: how often an item is given out again because its worker or node was lost. What the
                function raises is not tried again.
            cpus: cores that each call takes.

        Returns:
            Pairs of an item's position and its result, in the order in which they are done.

        Raises:
            RuntimeError, UserError: names the item that failed; the items still out are called off.
            UserError: a Ray that was started here has no node with so many cores.
        """
        self._connect()
        if not detached():
            _refuse_what_is_too_large(function, cpus)
        environment = self._runtime_env(function, None)
        return map_items(
            function, items, in_flight=in_flight, retries=retries, cpus=cpus, runtime_env=environment
        )

    def _connect(self) -> None:
        """Join the cluster, or start one; a process that has joined one stays with it."""
        address = self._address or os.environ.get("RAY_ADDRESS")
        with _CONNECTING:  # the stages of a graph come here side by side
            if address is None:
                demand_a_token()
            if load_ray().is_initialized():
                return
            if address is not None:
                join(address, NAMESPACE)
            elif "SLURM_JOB_ID" in os.environ:
                allocation = AllocationRay(os.environ)
                atexit.register(allocation.stop)
                join(allocation.address, OWN)
                allocation.wait_for_nodes()
            else:
                start_here()

    def _runtime_env(self, function: str, run: Path | None) -> dict[str, Any]:
        """The site's environment, and where the workers find the source."""
        folders = [] if run is None else [str(run / "source")]
        folders += source_folders(function)
        environment = {} if self.site is None else dict(self.site.environment)
        return {"env_vars": environment | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))}}


class RayHandle:
    """A job that Ray runs."""

    def __init__(self, run: RunFolder, name: str, *, stream: Stream | None = None) -> None:
        self._run = run
        self._name = name
        self._stream = stream
        self._echo = Echo(run, stream)
        self._detached = detached()

    @property
    def id(self) -> str:
        """The name of the supervisor actor."""
        return self._name

    @property
    def detached(self) -> bool:
        """Whether the cluster is somebody else's; a Ray of our own ends with this process."""
        return self._detached

    def state(self) -> State:
        """Where the job is now."""
        return status_on_joined(self._run, self._name).state

    def wait(self) -> State:
        """Block until the job has ended for good. On a Ray of our own, signals become a request to save and
        stop; on another they end the waiting, and the job goes on.
        """
        with contextlib.nullcontext() if self._detached else signals_passed_on(self._pass_on):
            while not (state := self.state()).ended:
                self._echo.show()
                time.sleep(POLL_SECONDS)
        self._echo.show()
        return state

    def cancel(self) -> None:
        """Ask the ranks to save and end."""
        self._run.request_cancel()
        self._ask(signal.SIGTERM)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._stream is not None:
            self._stream.write(
                f"{signal.Signals(number).name}: saving and stopping at the next step; "
                "Ctrl-C (again) stops at once\n"
            )
        self._ask(number)

    def _ask(self, number: int) -> None:
        if (supervisor := find_supervisor(self._name)) is not None:
            supervisor.ask.remote(number)


def reopen(run: RunFolder) -> RayHandle:
    """The handle of a run that was submitted before, perhaps by another process.

    Raises:
        UserError: if its Ray cannot be reached from here.
    """
    rejoin(run)
    return RayHandle(run, actor_name(run.path))


def source_folders(function: str) -> list[str]:
    """Where this process has the product and the function from, for workers that have neither installed."""
    folders = []
    for package in dict.fromkeys([*PACKAGES, function.partition(":")[0].partition(".")[0]]):
        spec = importlib.util.find_spec(package)
        if spec is None or package in sys.stdlib_module_names:
            continue
        origins = [*(spec.submodule_search_locations or [spec.origin or ""])]
        folders += [str(Path(origin).parent) for origin in origins if origin]
    # What is installed here is for this Python; a worker has its own.
    return [folder for folder in dict.fromkeys(folders) if not folder.endswith("-packages")]


def _refuse_second(run: RunFolder) -> None:
    name, deadline = actor_name(run.path), time.monotonic() + PATIENCE
    while find_supervisor(name) is not None:
        before = run.status_before()
        if before is None or not before.state.ended or time.monotonic() > deadline:
            raise AlreadyRunning(
                f"the run in {run.path} is going on already, as Ray actor {name}; "
                f"`submit cancel {run.path}` ends it"
            )
        time.sleep(0.1)  # it has said its last word, and goes


def _start_supervisor(run: RunFolder, name: str, runtime_env: dict[str, Any]) -> None:
    ray = load_ray()
    actor = ray.remote(Supervisor).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        runtime_env=runtime_env,
    )
    try:
        ray.get(actor.remote(str(run.path), name, runtime_env).ready.remote())
    except ValueError as error:  # the name was taken in the meantime
        raise AlreadyRunning(f"the run in {run.path} is going on already: {error}") from None
    except ray.exceptions.RayError as error:
        message = f"Ray could not start the supervisor of {run.path}: {first_line(error)}"
        failure = Failure(rank=None, type=type(error).__name__, message=message)
        run.write_status(run.read_status().stopped(State.FAILED, failure=failure))
        raise RuntimeError(message) from error


def _refuse_what_is_too_large(function: str, cpus: float) -> None:
    """A Ray of our own does not grow: a call that no node has room for would wait for ever."""
    most = max(node["Resources"].get("CPU", 0) for node in load_ray().nodes() if node["Alive"])
    if cpus > most:
        raise UserError(
            f"each call of {function} wants {cpus:g} cores, and the largest node of the Ray started here has "
            f"{most:g}: ask for fewer, or give the address of a Ray cluster"
        )


def _refuse_what_cannot_fit(job: Job) -> None:
    """A Ray of our own does not grow."""
    nodes = [node for node in load_ray().nodes() if node["Alive"]]
    bundle = bundle_of(job.resources, cpus_per_rank(job.resources, nodes))
    fit = [
        node for node in nodes if all(node["Resources"].get(kind, 0) >= size for kind, size in bundle.items())
    ]
    if len(fit) < job.resources.nodes:
        wants = " and ".join(f"{size:g} {kind}" for kind, size in bundle.items())
        raise UserError(
            f"{job.name} wants {job.resources.nodes} nodes with {wants} each, and the Ray started here has "
            f"{len(fit)}: ask for less, or give the address of a Ray cluster"
        )
