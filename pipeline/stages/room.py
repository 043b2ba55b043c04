"""Where the stages of a graph run side by side, and for how many at a time there is room."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from cluster.executors import Executor
from cluster.job import Job
from cluster.local import LocalExecutor
from cluster.run.waiting import Stream

CORES_OF_A_STAGE = 8  # more speed up no small trunk: a larger machine has room for another stage


class Room(Protocol):
    """Says whether one more job may start."""

    def take(self, job: Job, stage: str, beside: int) -> tuple[Job, Executor] | None:
        """The job as it is to run here, and what runs it; None: not now.

        Args:
            stage: whose job it is.
            beside: how many stages of the graph might ever run at the same time as this one.
        """

    def give_back(self, stage: str) -> None:
        """Its job has ended, or was not started."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """A scheduler: it takes everything, and has it wait."""

    executor: Executor

    def take(self, job: Job, stage: str, beside: int) -> tuple[Job, Executor]:
        """Anything, as it is."""
        return job, self.executor

    def give_back(self, stage: str) -> None:
        """Nothing was taken."""


@dataclass(kw_only=True)
class Machine:
    """This machine: a stage has the GPUs that it asks for to itself, and its share of the cores.

    The share follows from the graph and from `jobs` alone, not from what happens to run: with as many
    threads, sums come out the same.

    Attributes:
        jobs: stages at a time.
        cores: of the machine.
        gpus: as CUDA_VISIBLE_DEVICES names them.
        stream: of a stage, where its output is repeated.
    """

    jobs: int
    cores: int
    gpus: tuple[str, ...] = ()
    stream: Callable[[str], Stream | None] = lambda stage: None
    _held: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def take(self, job: Job, stage: str, beside: int) -> tuple[Job, LocalExecutor] | None:
        """The job with its threads, on GPUs that no other has."""
        taken = {gpu for gpus in self._held.values() for gpu in gpus}
        free = [gpu for gpu in self.gpus if gpu not in taken]
        # One that wants more than there is gets all of it, and is refused for what it says.
        wanted = min(job.resources.ranks * job.resources.gpus_per_rank, len(self.gpus))
        if len(self._held) >= self.jobs or wanted > len(free):
            return None
        self._held[stage] = tuple(free[:wanted])
        if job.resources.cpus_per_rank is None:
            share = self.cores // min(self.jobs, beside + 1) // job.resources.ranks
            job = replace(job, resources=replace(job.resources, cpus_per_rank=max(1, share)))
        return job, LocalExecutor(stream=self.stream(stage), gpus=self._held[stage])

    def give_back(self, stage: str) -> None:
        """Its GPUs are free again."""
        del self._held[stage]


def machine_here(jobs: int | None, *, stream: Callable[[str], Stream | None]) -> Machine:
    """This machine.

    Args:
        jobs: stages at a time; None: one per GPU, or per eight cores if these are more.
    """
    from cluster.rank.torch_dist import gpus_here

    found, cores = gpus_here(), len(os.sched_getaffinity(0))
    named = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    gpus = tuple(named[:found] or map(str, range(found)))
    return Machine(
        jobs=jobs or max(1, len(gpus), cores // CORES_OF_A_STAGE), cores=cores, gpus=gpus, stream=stream
    )
