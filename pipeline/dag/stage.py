"""A stage: a function of a recipe and of inputs into a folder named by its key; and its receipt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from cluster.errors import UserError
from cluster.job import Job, Resources, import_function
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from cluster.typed_json import read_record
from cluster.typed_yaml import Section


class StopRequested(UserError):  # noqa: N818 -- nothing went wrong
    """Somebody asked a stage to stop: nothing after it is to be tried."""


class Receipt(BaseModel):
    """What a finished stage leaves in `receipt.json`, created once and never changed.

    Keys that another version of the product has written are passed over.

    Attributes:
        inputs: role → key of the stage that filled it, and the path in its folder.
        outputs: path relative to the folder → sha256 of the file, or of the folder's names and contents.
        metrics: what the stage found out; JSON values.
        started: seconds since 1970.
        gpu_hours: of devices held, busy or not.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: str
    stage: str
    kind: str
    version: int
    recipe: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    metrics: dict[str, Any]
    started: float
    seconds: float
    gpu_hours: float
    machine: str


def read_receipt(path: Path) -> Receipt:
    """The receipt in a file.

    Raises:
        UserError: if the file is damaged or cannot be read.
    """
    return read_record(Receipt, path, remedy="remove it, and the stage runs again")


@dataclass(frozen=True, kw_only=True)
class Input:
    """What fills a role: the path, and the receipt of the stage that made it."""

    path: Path
    receipt: Receipt


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage's function gets. It writes into `folder` only.

    The folder may hold what a killed attempt left behind: the function overwrites that, or goes on from it.
    """

    recipe: Any  # the Section that the kind names
    inputs: Mapping[str, Input]
    folder: Path


class Result(NamedTuple):
    """What a stage's function returns; outputs are files and folders, relative to the stage's folder.

    `gpus` are those that it held; a job of several attempts knows itself what these took: `job`. `known` are
    the sha256 of files that were taken when these were written: the receipt repeats them.
    """

    metrics: dict[str, Any]
    outputs: list[str]
    gpus: int = 0
    job: Status | None = None
    known: Mapping[Path, str] = MappingProxyType({})


@dataclass(frozen=True)
class Later:
    """A function by its name, "package.module:function", imported when it is called.

    To know the keys of a graph takes its recipes, and not what its stages run with.
    """

    name: str

    def __call__(self, *arguments: Any) -> Any:
        return import_function(self.name)(*arguments)


def _nothing_outside(recipe: Any) -> str:
    return ""


def _one_process(recipe: Any, gpus_per_node: int | None) -> Resources:
    return Resources()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of stage.

    Attributes:
        recipe: the type of its recipe.
        run: does the work in one process; for a kind with a job, sums up what the job has left.
        job: the work as a job of several ranks, which can be stopped and goes on from where it saved.
        resources: what it runs on, from the recipe and the GPUs of a node (None: as on this machine).
        refuse: raises a UserError if the recipe could only fail on these resources, whatever its inputs are.
        inputs: roles that must be filled.
        optional: roles that may be filled.
        watching: of these, the roles of what only looks at the work, and is no part of its key.
        alike: how many inputs it takes at least, where these are all of one sort and their roles are names of
            anybody's choice; 0 where only the roles above may be filled.
        version: raised whenever the same recipe and inputs come to give another output.
        outside: the identity of what the recipe points to outside of the graph, such as a folder of pictures.
    """

    recipe: type[Section]
    run: Callable[[Work], Result]
    job: Callable[[Work, Resources], Job] | None = None
    resources: Callable[[Any, int | None], Resources] = _one_process
    refuse: Callable[[Any, Resources], None] | None = None
    inputs: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    watching: frozenset[str] = frozenset()
    alike: int = 0
    version: int = 1
    outside: Callable[[Any], str] = _nothing_outside


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a role is filled from: a stage's folder, or a path in it."""

    stage: Stage
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Work to be done once. Stages with equal keys share a folder, whatever they are called."""

    name: str
    kind_name: str
    kind: Kind
    recipe: Section
    inputs: Mapping[str, Origin]
    root: Path
    known_key: str | None = None

    @cached_property
    def key(self) -> str:
        """64 hexadecimal digits."""
        return self.known_key or stage_key(
            kind=self.kind_name,
            version=self.kind.version,
            recipe=self.recipe,
            inputs={role: key for role, key in self.input_keys.items() if role not in self.kind.watching},
            outside=self.kind.outside(self.recipe),
        )

    @property
    def input_keys(self) -> dict[str, str]:
        """Role → key of the stage and the path in its folder."""
        return {role: f"{source.stage.key}/{source.path}" for role, source in self.inputs.items()}

    @property
    def sources(self) -> list[str]:
        """Names of the stages that it reads, sorted."""
        return sorted({source.stage.name for source in self.inputs.values()})

    @property
    def folder(self) -> Path:
        """Where the output goes."""
        return self.root / f"{self.kind_name}-{self.key[:12]}"


def stage_key(*, kind: str, version: int, recipe: Section, inputs: Mapping[str, str], outside: str) -> str:
    """The digest that names a piece of work; what `steers` it, such as where it runs, is no part of it."""
    parts = [kind, version, recipe.identity(), dict(inputs), outside]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def job_folder(stage: Stage) -> RunFolder:
    """The run folder of a stage's job. A training's is the stage's own: the ranks write into it."""
    if stage.kind.job is not None:
        return RunFolder(stage.folder)
    return RunFolder(stage.root / "jobs" / stage.folder.name)
