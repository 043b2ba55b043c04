"""What has become of a run on Ray, for whoever looks."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.errors import AlreadyRunning, UserError
from cluster.job import State
from cluster.ray.connect import (
    NAMESPACE,
    load_ray,
    read_submission,
    rejoin,
)
from cluster.run.folder import RunFolder
from cluster.run.status import Failure, Status


def current_status(run: RunFolder, *, locked: bool = False) -> Status:
    """What status.json says, corrected by what Ray says: a supervisor that was killed writes nothing.

    Args:
        locked: this process holds the run's lock.

    Raises:
        UserError: if the run has not ended, and its Ray cannot be reached from here.
    """
    status = run.read_status()
    if status.state.ended:
        return status
    try:
        rejoin(run)
    except UserError:
        if not read_submission(run).own:
            raise
        if not locked and _is_shared(run):  # by its supervisor and its ranks
            return replace(status, reason="its Ray cannot be reached from here")
        return _ended_without_a_word(run, status)  # its Ray ended with whoever submitted it
    return status_on_joined(run, actor_name(run.path))


def _is_shared(run: RunFolder) -> bool:
    """Whether anybody holds the run's lock."""
    try:
        run.lock(patience=0).close()
    except AlreadyRunning:
        return True
    return False


def actor_name(folder: Path) -> str:
    """The supervisor's name: equal for every submission of one run."""
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    return f"{folder.name}-{digest}"


def status_on_joined(run: RunFolder, name: str) -> Status:
    """The status, as true as a process that has joined the cluster can tell."""
    status = run.read_status()
    if status.state.ended or find_supervisor(name) is not None:
        return status
    return _ended_without_a_word(run, run.read_status())  # it may have ended properly between the two looks


def _ended_without_a_word(run: RunFolder, status: Status) -> Status:
    if status.state.ended:
        return status
    if run.cancel_requested():
        return replace(status, state=State.CANCELLED)
    message = (
        "the supervisor is gone without having written how it ended: the Ray cluster was stopped; "
        "`submit resume` goes on from the last checkpoint"
    )
    return replace(status, state=State.FAILED, failure=Failure(rank=None, type="Killed", message=message))


def find_supervisor(name: str) -> Any:
    """The supervisor; None if there is none."""
    try:
        return load_ray().get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None
