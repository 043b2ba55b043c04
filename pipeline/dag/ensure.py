"""A stage runs once for its key, and leaves a receipt.

The key is a digest of the stage's kind, its recipe without the `run` section, its inputs' keys, and the
kind's version: keys are known before anything has run. `ensure` is the one way to run a stage; it returns
the receipt of an earlier run if there is one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from cluster.errors import UserError
from cluster.executors import status_of
from cluster.job import Executor, Job, Resources, State
from cluster.run.folder import RunFolder
from cluster.run.status import Status, explain, raise_unless_completed
from cluster.typed_yaml import Section

logger = logging.getLogger(__name__)


class StopRequested(UserError):  # noqa: N818 -- nothing went wrong
    """Somebody asked a stage to stop: nothing after it is to be tried."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a finished stage leaves in `receipt.json`, created once and never changed.

    Attributes:
        inputs: role → key of the stage that filled it, and the path in its folder.
        outputs: path relative to the folder → sha256 of the file, or of the folder's names and contents.
        metrics: what the stage found out; JSON values.
        started: seconds since 1970.
        gpu_hours: of devices held, busy or not.
    """

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

    `gpus` are those that it held; a job of several attempts knows itself what these took: `job`.
    """

    metrics: dict[str, Any]
    outputs: list[str]
    gpus: int = 0
    job: Status | None = None


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
        inputs: roles that must be filled.
        optional: roles that may be filled.
        alike: how many inputs it takes at least, where these are all of one sort and their roles are names of
            anybody's choice; 0 where only the roles above may be filled.
        version: raised whenever the same recipe and inputs come to give another output.
        outside: the identity of what the recipe points to outside of the graph, such as a folder of pictures.
    """

    recipe: type[Section]
    run: Callable[[Work], Result]
    job: Callable[[Work, Resources], Job] | None = None
    resources: Callable[[Any, int | None], Resources] = _one_process
    inputs: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    alike: int = 0
    version: int = 1
    outside: Callable[[Any], str] = _nothing_outside


@dataclass(frozen=True, kw_only=True)
class Source:
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
    inputs: Mapping[str, Source]
    root: Path
    known_key: str | None = None

    @cached_property
    def key(self) -> str:
        """64 hexadecimal digits."""
        return self.known_key or stage_key(
            kind=self.kind_name,
            version=self.kind.version,
            recipe=self.recipe,
            inputs=self.input_keys,
            outside=self.kind.outside(self.recipe),
        )

    @property
    def input_keys(self) -> dict[str, str]:
        """Role → key of the stage and the path in its folder."""
        return {role: f"{source.stage.key}/{source.path}" for role, source in self.inputs.items()}

    @property
    def folder(self) -> Path:
        """Where the output goes."""
        return self.root / f"{self.kind_name}-{self.key[:12]}"


class Ensured(NamedTuple):
    """A stage's receipt, and whether it had to run for it."""

    receipt: Receipt
    ran: bool


def stage_key(*, kind: str, version: int, recipe: Section, inputs: Mapping[str, str], outside: str) -> str:
    """The digest that names a piece of work; where and how it runs (`run`) is no part of it."""
    parts = [kind, version, _without_run(recipe), dict(inputs), outside]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def ensure(stage: Stage, executor: Executor) -> Ensured:
    """The stage's receipt; if there is none, its inputs are ensured and it runs, in one process at a time.

    Others that want the same stage wait for it. A killed attempt leaves no receipt, and the next one goes on.
    """
    if receipt := find_receipt(stage):
        return Ensured(receipt, ran=False)
    receipts = {role: ensure(source.stage, executor).receipt for role, source in stage.inputs.items()}
    with _locked(stage):
        if receipt := find_receipt(stage):
            return Ensured(receipt, ran=False)
        started, work = time.time(), prepare(stage, receipts)
        if stage.kind.job is not None:
            resources = stage.kind.resources(stage.recipe, None)
            run_job(stage.kind.job(work, resources), executor)
        return Ensured(finish(stage, work, started=started), ran=True)


def prepare(stage: Stage, receipts: Mapping[str, Receipt]) -> Work:
    """Make the stage's folder ready, and say what is to be done there.

    Args:
        receipts: role → the receipt of the stage that fills it.
    """
    stage.folder.mkdir(parents=True, exist_ok=True)
    inputs = {
        role: Input(path=source.stage.folder / source.path, receipt=receipts[role])
        for role, source in stage.inputs.items()
    }
    return Work(recipe=stage.recipe, inputs=inputs, folder=stage.folder)


def finish(stage: Stage, work: Work, *, started: float) -> Receipt:
    """Do the work, or sum up the job that has done it, and publish the receipt.

    Args:
        started: seconds since 1970.
    """
    result = stage.kind.run(work)
    seconds = time.time() - started if result.job is None else result.job.seconds
    gpu_hours = result.gpus * seconds / 3600 if result.job is None else result.job.gpu_hours
    receipt = Receipt(
        key=stage.key,
        stage=stage.name,
        kind=stage.kind_name,
        version=stage.kind.version,
        recipe=stage.recipe.model_dump(mode="json"),
        inputs=stage.input_keys,
        outputs={path: content_digest(stage.folder / path) for path in result.outputs},
        metrics=result.metrics,
        started=started,
        seconds=round(seconds, 3),
        gpu_hours=round(gpu_hours, 6),
        machine=_machine(),
    )
    if find_receipt(stage) is None:  # what is there, if anything, is a receipt whose outputs were gone
        (stage.folder / "receipt.json").unlink(missing_ok=True)
    return _publish(receipt, stage.folder / "receipt.json")


def run_job(job: Job, executor: Executor) -> None:
    """Submit a job and wait for its end.

    Raises:
        StopRequested: if it was asked to stop.
        UserError: if it failed for a reason that the user can mend.
        RuntimeError: if it failed otherwise.
    """
    state = executor.submit(job).wait()
    run = RunFolder(job.folder)
    if state in (State.PREEMPTED, State.CANCELLED):
        raise StopRequested(explain(status_of(run)))
    raise_unless_completed(status_of(run))


def find_receipt(stage: Stage) -> Receipt | None:
    """The receipt of an earlier run whose outputs are still there."""
    path = stage.folder / "receipt.json"
    if not path.is_file():
        return None
    receipt = Receipt(**json.loads(path.read_text()))
    missing = [name for name in receipt.outputs if not (stage.folder / name).exists()]
    if missing:
        logger.warning("%s has a receipt but %s is gone: it runs again", stage.folder, ", ".join(missing))
        return None
    return receipt


def content_digest(path: Path) -> str:
    """sha256 of a file; of a folder, of its files' names and digests."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(f"a stage promised {path} and did not write it")
    lines = [
        f"{file.relative_to(path).as_posix()} {content_digest(file)}\n"
        for file in sorted(path.rglob("*"))
        if file.is_file()
    ]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def folder_identity(folder: Path) -> str:
    """A digest of what a user's folder (or file) holds, by names, sizes and modification times.

    Reading every picture to be sure would cost more than working again after a `touch`.

    Raises:
        UserError: if there is nothing at the path.
    """
    if not folder.exists():
        raise UserError(f"{folder} does not exist; give a folder of pictures that does")
    digest = hashlib.sha256()
    for name in list_files(folder) if folder.is_dir() else [""]:
        status = (folder / name).stat()
        digest.update(os.fsencode(name) + f"\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def list_files(folder: Path) -> list[str]:
    """Relative names of the regular files under a folder, sorted; links and hidden ones are left out.

    Raises:
        UserError: if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that exists")
    names = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            path = Path(place) / file
            if not file.startswith(".") and path.is_file() and not path.is_symlink():
                names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def _machine() -> str:
    """Name, processor and cores of this machine, for people."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.machine()
    return f"{socket.gethostname()}, {processor}, {len(os.sched_getaffinity(0))} cores"


def _without_run(recipe: Section) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude={"run"})


def _publish(receipt: Receipt, path: Path) -> Receipt:
    """Create the file whole or not at all; if somebody else was first, theirs counts."""
    temporary = path.with_name(f".receipt.{socket.gethostname()}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(asdict(receipt), file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileExistsError):
        path.hardlink_to(temporary)
    temporary.unlink()
    return Receipt(**json.loads(path.read_text()))


@contextmanager
def _locked(stage: Stage) -> Iterator[None]:
    """Hold the stage's lock; the kernel gives it back when its holder dies, however it dies."""
    path = stage.root / ".locks" / stage.folder.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s is being made by another process: waiting for it", stage.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
