"""What can be run, and what is left in the hand of whoever has submitted it."""

from __future__ import annotations

import gc
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol

from cluster.errors import UserError

ExecutorName = Literal["local", "slurm", "ray"]
DeviceName = Literal["auto", "cpu", "cuda"]  # auto: a GPU if there is one

PREEMPTED_EXIT_CODE = 85  # "asked to stop, saved, start me again": the same code on every executor


class State(StrEnum):
    """Where a job is in its life; all but the first four are ends. Two of them only a look tells of, and no
    file: that a scheduler has suspended a job, and that who knows what has become of it does not answer.
    """

    PENDING = "pending"
    RUNNING = "running"
    SUSPENDED = "suspended"
    UNKNOWN = "unknown"
    COMPLETED = "completed"
    FAILED = "failed"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    NODE_FAIL = "node_fail"
    OUT_OF_MEMORY = "out_of_memory"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen without a new submission."""
        return self not in (State.PENDING, State.RUNNING, State.SUSPENDED, State.UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job runs on.

    Args:
        nodes: machines.
        ranks_per_node: processes per machine.
        gpus_per_rank: 0 means CPU.
        cpus_per_rank: compute threads of each rank; None shares the machine's cores between its ranks.
        minutes: the longest it may run before it is asked to save and is started again; None: as long as
            the site allows. Only schedulers with a time limit heed it.
    """

    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_rank: int = 0
    cpus_per_rank: int | None = None
    minutes: int | None = None

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class Task:
    """The place of a job in an array of SLURM's: the array's name, and a number there."""

    array: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """An importable function and its JSON arguments, called once on every rank. Nothing is pickled (S1).

    Args:
        name: for people: letters, digits, dot, dash and underscore.
        function: "package.module:function", importable where the ranks run.
        arguments: keyword arguments; JSON values only.
        resources: how many ranks, with what.
        folder: the run folder: status, logs and errors go there, and whatever the function writes.
        max_crashes: how often it may crash, without a newer checkpoint, until it is not started again by
            itself. Executors that never restart a job ignore it.
        task: of the array that it was submitted in; None if it was submitted alone.
        directory: where relative paths among the arguments begin; None: where it was submitted.
    """

    name: str
    function: str
    arguments: Mapping[str, Any]
    resources: Resources
    folder: Path
    max_crashes: int = 3
    task: Task | None = None
    directory: Path | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(f"{self.name!r} cannot be a job's name: use letters, digits, '.', '-' and '_'")
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.function):
            raise ValueError(f"a job's function is written 'package.module:function', not {self.function!r}")

    def to_json(self) -> str:
        """The job as `RunFolder.read_job` reads it back."""
        values = asdict(self) | {"arguments": dict(self.arguments), "folder": str(self.folder)}
        if self.directory is not None:
            values["directory"] = str(self.directory)
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    def resolve(self) -> Callable[..., Any]:
        """Import the function."""
        return import_function(self.function)


def import_function(name: str) -> Callable[..., Any]:
    """The function that is called "package.module:function"."""
    module, _, own = name.partition(":")
    with nullcontext() if module in sys.modules else stays():
        function: Callable[..., Any] = getattr(importlib.import_module(module), own)
    return function


@contextmanager
def stays() -> Iterator[None]:
    """What is imported in here stays: the garbage collector does not look through it, neither meanwhile nor
    at the end of the process. Of a short process that imports PyTorch that took a third of the time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def import_name(function: Callable[..., Any]) -> str:
    """By which another machine imports it."""
    return f"{function.__module__}:{function.__name__}"


class Handle(Protocol):
    """A submitted job."""

    @property
    def id(self) -> str:
        """The executor's own name of the job."""

    @property
    def detached(self) -> bool:
        """Whether the job goes on when this process ends; else somebody has to `wait()`."""

    def state(self) -> State:
        """Where the job is now; does not block."""

    def wait(self) -> State:
        """Block until the job has ended; its final state."""

    def cancel(self) -> None:
        """Ask the job to end; returns at once."""
