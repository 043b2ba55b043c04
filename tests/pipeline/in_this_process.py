"""Jobs of one rank, run where the tests run: a graph of ten stages then imports PyTorch once.

What it leaves out, processes and their ends, is tested with the executors.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import IO, ClassVar

from cluster.job import ExecutorName, Job, State
from cluster.run.folder import RunFolder
from cluster.run.status import Status


@dataclass(frozen=True)
class Done:
    """The hand of a job that has ended."""

    id: str = "here"
    detached: bool = False

    def state(self) -> State:
        return State.COMPLETED

    def wait(self) -> State:
        return State.COMPLETED

    def cancel(self) -> None:
        """Nothing is left of it."""


@dataclass(frozen=True)
class InThisProcess:
    """An executor. What a job raises, submitting it raises."""

    name: ClassVar[ExecutorName] = "local"
    site: None = None

    def refuse_impossible(self, job: Job) -> None:
        assert job.resources.ranks == 1

    def start(self, job: Job, run: RunFolder, pending: Status, lock: IO[str]) -> Done:
        status = replace(pending, attempt=pending.attempt + 1, started=time.time())
        with lock:
            job.resolve()(**job.arguments)
            run.write_status(status.stopped(State.COMPLETED))
        return Done()
