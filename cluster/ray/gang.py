"""The ranks of one attempt on Ray: placed together, started together, ended together."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass, replace
from typing import Any

from cluster.job import PREEMPTED_EXIT_CODE, Job, Resources, State
from cluster.rank.process import SECONDS_TO_END, death
from cluster.ray.connect import NAMESPACE, first_line, load_ray
from cluster.ray.rank_worker import Place, RankWorker
from cluster.run.folder import RunFolder
from cluster.run.restarts import Cause
from cluster.run.status import Failure

TICK = 0.5  # seconds between two looks at what somebody wishes
# Ray takes up to half a minute to find out that a node is gone; then a rank that obeys no signal is given up.
PATIENCE_WITH_NODES = 60.0
DRAIN_SECONDS = 2.0  # between two looks at which nodes are to go
PATIENCE_WITH_STARTS = 300.0  # an actor's environment may have to be installed first


class Wishes:
    """What was asked of the run from outside, in another thread.

    Attributes:
        number: the signal that the ranks are to get; None while nobody has asked.
        at_once: they are to be killed.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self.number: signal.Signals | None = None
        self.at_once = False

    def ask(self, number: int) -> None:
        """Have the ranks save and end, for good; a second SIGINT does not wait for that."""
        self.at_once = self.at_once or (self.number is not None and number == signal.SIGINT)
        self.number = signal.SIGUSR2 if number == signal.SIGUSR2 else signal.SIGTERM

    def look(self) -> signal.Signals | None:
        """What the ranks are to get now. The file alone will do, from a machine that cannot reach Ray."""
        if self.number is None and self._run.cancel_requested():
            self.number = signal.SIGTERM
        return self.number


@dataclass(frozen=True, kw_only=True)
class End:
    """How an attempt ended.

    Attributes:
        state: as if there were no other attempt.
        cause: why, unless it completed.
        failure: of the rank that is to blame.
    """

    state: State
    cause: Cause | None = None
    failure: Failure | None = None


class Gang:
    """One attempt.

    Args:
        start: which start of this submission it is, from 0.
        name: what Ray shows: the run's name and the attempt.
        runtime_env: of the actors, so that they import the run's source.
        wishes: looked at all the while.
    """

    def __init__(
        self, job: Job, run: RunFolder, *, start: int, name: str, runtime_env: dict[str, Any], wishes: Wishes
    ) -> None:
        self._ray = load_ray()
        self._job = job
        self._run = run
        self._start = start
        self._name = name
        self._runtime_env = runtime_env
        self._wishes = wishes
        self._group: Any = None
        self._workers: list[Any] = []
        self._places: list[Place] = []
        self._pending: dict[Any, int] = {}  # what a rank's status will come from
        self._codes: dict[int, int] = {}
        self._lost: dict[int, str] = {}
        self._refused: dict[int, Failure] = {}
        self._ended_by_us: set[int] = set()
        self._sent: set[signal.Signals] = set()
        self._threads = 1
        self._failed_at: float | None = None
        self._marked = False
        self._look_at = 0.0
        self._log_starts = [
            run.log(rank).stat().st_size if run.log(rank).exists() else 0
            for rank in range(job.resources.ranks)
        ]

    @property
    def hosts(self) -> list[str]:
        """The machines, each once, in the order of their ranks."""
        return list(dict.fromkeys(place.host for place in self._places))

    def place(self) -> bool:
        """Wait until the cluster has room for all ranks at once, and take it.

        Returns:
            False if somebody asked for the end in the meantime.
        """
        share, placement_group = 0.0, self._ray.util.placement_group
        while self._wishes.look() is None:
            # Nodes come and go while it waits, and a share of the wrong nodes may fit nowhere.
            if (now := cpus_per_rank(self._job.resources, self._ray.nodes())) != share:
                self._remove_group()
                share, bundle = now, bundle_of(self._job.resources, now)
                self._group = placement_group(
                    [bundle] * self._job.resources.nodes, strategy="STRICT_SPREAD", name=self._name
                )
            if self._group.wait(TICK):
                self._start_workers(share)
                return True
        return False

    def _start_workers(self, share: float) -> None:
        wants = self._job.resources
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        actor = self._ray.remote(RankWorker)
        for rank in range(wants.ranks):
            bundle = rank // wants.ranks_per_node
            options = actor.options(
                name=f"{self._name} rank {rank}",
                namespace=NAMESPACE,
                num_cpus=share,
                num_gpus=wants.gpus_per_rank,
                max_concurrency=2,  # one to wait for the process, one to signal it
                scheduling_strategy=strategy(self._group, placement_group_bundle_index=bundle),
                runtime_env=self._runtime_env,
            )
            self._workers.append(options.remote(str(self._run.path), rank))
        self._threads = max(1, int(share))

    def locate(self) -> End | None:
        """Learn where Ray has put the ranks; how it ended if a node has gone already, or it was to end."""
        asked = [worker.place.remote() for worker in self._workers]
        deadline = time.monotonic() + PATIENCE_WITH_STARTS
        # The actor of a node that has gone waits for another node, perhaps for ever.
        while len(self._ray.wait(asked, num_returns=len(asked), timeout=TICK)[0]) < len(asked):
            if self._wishes.look() is not None:
                return End(state=State.PREEMPTED, cause=Cause.PREEMPTED)
            if time.monotonic() > deadline:
                return self._lost_before_the_start("Ray has not started their actors")
        try:
            self._places = self._ray.get(asked)
        except self._ray.exceptions.RayError as error:
            return self._lost_before_the_start(first_line(error))
        return None

    def _lost_before_the_start(self, why: str) -> End:
        message = f"a node or its worker was gone before the ranks had started: {why}"
        failure = Failure(rank=None, type="Lost", message=message)
        return End(state=State.FAILED, cause=Cause.LOST, failure=failure)

    def start(self) -> None:
        """Start the ranks, all at once."""
        first = self._places[0]
        for rank, worker in enumerate(self._workers):
            places = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % self._job.resources.ranks_per_node),
                "WORLD_SIZE": str(self._job.resources.ranks),
                "MASTER_ADDR": first.address,
                "MASTER_PORT": str(first.port),
                "SUBMIT_START": str(self._start),
            }
            if self._job.resources.nodes == 1:
                places |= {"SUBMIT_STORE": str(self._run.store(self._start)), "GLOO_SOCKET_IFNAME": "lo"}
            self._pending[worker.run.remote(places, self._threads)] = rank

    def watch(self) -> End:
        """Wait for the end of all ranks; when one has failed, end the others."""
        while self._pending:
            self._leave_draining_nodes()
            ended, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=TICK)
            for reference in ended:
                self._take(reference, self._pending.pop(reference))
            if (wish := self._wishes.look()) is not None:
                self._send(signal.SIGKILL if self._wishes.at_once else wish)
            if self._failed_ranks():
                self._end_the_others()
        return self._end()

    def _leave_draining_nodes(self) -> None:
        """Have all ranks save, and start elsewhere, if Ray is about to take one of their nodes away."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + DRAIN_SECONDS
        if draining_nodes() & {place.node for place in self._places}:
            self._send(signal.SIGUSR2)

    def close(self) -> None:
        """Give everything back to Ray."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._remove_group()

    def _remove_group(self) -> None:
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
            self._group = None

    def _take(self, reference: Any, rank: int) -> None:
        try:
            self._codes[rank] = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # the actor lives, and could not start the process
            self._refused[rank] = Failure(
                rank=rank,
                type=type(error.cause).__name__,
                message=str(error.cause),
                node=self._places[rank].host,
            )
        except self._ray.exceptions.RayError as error:
            self._lost[rank] = first_line(error)

    def _failed_ranks(self) -> list[int]:
        wrong = [rank for rank, code in self._codes.items() if code not in (0, PREEMPTED_EXIT_CODE)]
        return wrong + list(self._lost) + list(self._refused)

    def _end_the_others(self) -> None:
        now = time.monotonic()
        if self._failed_at is None:
            self._failed_at = now
            # Looked at before anybody is asked to end: a rank that obeys marks its own end as well.
            self._marked = self._run.requeue_mark(self._start).exists()
            self._ended_by_us = set(self._pending.values())
            self._send(signal.SIGTERM)
        elif now > self._failed_at + PATIENCE_WITH_NODES:
            for reference, rank in list(self._pending.items()):
                self._lost[rank] = "its node does not answer"
                del self._pending[reference]
        elif now > self._failed_at + SECONDS_TO_END:
            self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if number in self._sent:
            return
        self._sent.add(number)
        for rank in self._pending.values():
            self._workers[rank].send.remote(int(number))

    def _end(self) -> End:
        failed = self._failed_ranks()
        if not failed and all(code == 0 for code in self._codes.values()):
            return End(state=State.COMPLETED)
        if self._run.done_mark(self._start).exists():
            return End(state=State.COMPLETED, failure=self._loss() if self._lost else self._first_failure())
        if failed and (hang := self._hang()) is not None:  # whatever its end did to the others
            return End(state=State.FAILED, cause=Cause.HANG, failure=hang)
        marked = self._marked if failed else self._run.requeue_mark(self._start).exists()
        if marked or (self._wishes.number is not None and self._only_as_asked()):
            return End(state=State.PREEMPTED, cause=Cause.PREEMPTED)
        if self._lost:  # its peers have errors of their own: their connections broke
            return End(state=State.FAILED, cause=Cause.LOST, failure=self._loss())
        return End(state=State.FAILED, cause=Cause.CRASH, failure=self._first_failure())

    def _hang(self) -> Failure | None:
        """What the watchdog of a node has written down before it killed the ranks there."""
        error = self._run.first_error()
        return error if error is not None and error.type == "Hang" else None

    def _only_as_asked(self) -> bool:
        """Whether no rank ended otherwise than by what it was asked to do, or was killed with."""
        asked = {0, PREEMPTED_EXIT_CODE, -signal.SIGKILL, *(-number for number in self._sent)}
        return not self._lost and not self._refused and set(self._codes.values()) <= asked

    def _loss(self) -> Failure:
        rank, why = min(self._lost.items())
        host = self._places[rank].host
        return Failure(
            rank=rank, type="Lost", message=f"the node {host} or its worker is gone: {why}", node=host
        )

    def _first_failure(self) -> Failure:
        """Of the rank that the others failed of. One killed without a word comes before those that wrote."""
        if self._refused:
            return min(self._refused.items())[1]
        for rank in self._failed_ranks():
            if rank in self._codes and not (rank in self._ended_by_us or self._run.error(rank).is_file()):
                return self._death(rank)
        if (error := self._run.first_error()) is not None:
            return error if error.rank is None else replace(error, log_tail=self._tail(error.rank))
        # What is left: killed by us before a word, or ended as if saved, without the mark that all have.
        return self._death(min(rank for rank, code in self._codes.items() if code != 0))

    def _death(self, rank: int) -> Failure:
        code = self._codes.get(rank, -signal.SIGKILL)
        return death(rank, code, log_tail=self._tail(rank), node=self._places[rank].host)

    def _tail(self, rank: int) -> tuple[str, ...]:
        return tuple(self._run.tail(rank, start=self._log_starts[rank]))


def draining_nodes() -> set[str]:
    """Ids of the nodes that are to go, as their cloud or their administrator has told Ray.

    Ray says so by a private call only, as its own trainer asks: a version without it is asked nothing.
    """
    try:
        return set(load_ray()._private.state.state.get_draining_nodes())
    except (AttributeError, TypeError):
        return set()


def cpus_per_rank(wants: Resources, nodes: list[dict[str, Any]]) -> float:
    """Cores that each rank takes: as asked, else an equal share of the smallest of the largest nodes.

    Args:
        nodes: as `ray.nodes()` lists them.
    """
    if wants.cpus_per_rank is not None:
        return float(wants.cpus_per_rank)
    gpus = wants.gpus_per_rank * wants.ranks_per_node
    fit = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus]
    cores = sorted((node.get("CPU", 0.0) for node in fit), reverse=True)[: wants.nodes]
    share = (min((size for size in cores if size > 0), default=1.0)) / wants.ranks_per_node
    # Ray counts in steps of 1/10,000; fewer cores than ranks are shared, as they are on this machine.
    return float(math.floor(share)) if share >= 1 else math.floor(share * 10_000) / 10_000


def bundle_of(wants: Resources, share: float) -> dict[str, float]:
    """What one node of the job must have free."""
    bundle = {"CPU": share * wants.ranks_per_node}
    if wants.gpus_per_rank > 0:
        bundle["GPU"] = float(wants.gpus_per_rank * wants.ranks_per_node)
    return bundle
