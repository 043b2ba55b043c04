"""A stage runs once for its key, and leaves a receipt.

The key is a digest of the stage's kind, its recipe without the `run` section, its inputs' keys, and the
kind's version: keys are known before anything has run. `ensure` is the one way to run a stage; it returns
the receipt of an earlier run if there is one.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from cluster.errors import UserError
from cluster.executors import Executor, status_of
from cluster.file_lock import lock_file
from cluster.job import Job, State
from cluster.run.folder import RunFolder
from cluster.run.status import explain, raise_unless_completed
from cluster.submit import submit
from pipeline.dag.digests import content_digest
from pipeline.dag.stage import Input, Receipt, Stage, StopRequested, Work, read_receipt

logger = logging.getLogger(__name__)


class Ensured(NamedTuple):
    """A stage's receipt, and whether it had to run for it."""

    receipt: Receipt
    ran: bool


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


def is_finished(stage: Stage) -> bool:
    """Whether it has a receipt; a damaged one is told by whoever runs the stage, and the others go on."""
    try:
        return find_receipt(stage) is not None
    except UserError:
        return False


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
        outputs={path: content_digest(stage.folder / path, result.known) for path in result.outputs},
        metrics=result.metrics,
        started=started,
        seconds=round(seconds, 3),
        gpu_hours=round(gpu_hours, 6),
        machine=_machine(),
    )
    if find_receipt(stage) is None:  # what is there, if anything, is a receipt whose outputs were gone
        receipt_file(stage).unlink(missing_ok=True)
    return _publish(receipt, receipt_file(stage))


def run_job(job: Job, executor: Executor) -> None:
    """Submit a job and wait for its end.

    Raises:
        StopRequested: if it was asked to stop.
        UserError: if it failed for a reason that the user can mend.
        RuntimeError: if it failed otherwise.
    """
    state = submit(job, executor).wait()
    run = RunFolder(job.folder)
    if state in (State.PREEMPTED, State.CANCELLED):
        raise StopRequested(explain(status_of(run)))
    raise_unless_completed(status_of(run))


def receipt_file(stage: Stage) -> Path:
    """Where a stage's receipt is, once it has run."""
    return stage.folder / "receipt.json"


def find_receipt(stage: Stage) -> Receipt | None:
    """The receipt of an earlier run whose outputs are still there."""
    path = receipt_file(stage)
    if not path.is_file():
        return None
    receipt = read_receipt(path)
    missing = [name for name in receipt.outputs if not (stage.folder / name).exists()]
    if missing:
        logger.warning("%s has a receipt but %s is gone: it runs again", stage.folder, ", ".join(missing))
        return None
    return receipt


def _machine() -> str:
    """Name, processor and cores of this machine, for people."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.machine()
    return f"{socket.gethostname()}, {processor}, {len(os.sched_getaffinity(0))} cores"


def _publish(receipt: Receipt, path: Path) -> Receipt:
    """Create the file whole or not at all; if somebody else was first, theirs counts."""
    temporary = path.with_name(f".receipt.{socket.gethostname()}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(receipt.model_dump(), file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileExistsError):
        path.hardlink_to(temporary)
    temporary.unlink()
    return read_receipt(path)


@contextmanager
def _locked(stage: Stage) -> Iterator[None]:
    """Hold the stage's lock; the kernel gives it back when its holder dies, however it dies."""
    path = _lock_path(stage)
    with path.open("w") as file:
        if not lock_file(file, path):
            logger.info("%s is being made by another process: waiting for it", stage.name)
            lock_file(file, path, wait=True)
        yield


def lock_if_free(stage: Stage) -> IO[str] | None:
    """The stage's lock, to be closed by the caller; None if somebody makes the stage."""
    path = _lock_path(stage)
    with ExitStack() as stack:
        file = stack.enter_context(path.open("w"))
        if lock_file(file, path):
            stack.pop_all()
            return file
    return None


def _lock_path(stage: Stage) -> Path:
    path = stage.root / ".locks" / stage.folder.name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
