"""What has become of a run on Ray, for whoever looks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.job import State
from cluster.ray.connect import (
    NAMESPACE,
    Reached,
    is_joined,
    load_ray,
    reach_users_ray,
    read_submission,
    rejoin,
)
from cluster.run.folder import RunFolder
from cluster.run.notify import notify
from cluster.run.status import Failure, Status


def current_status(
    run: RunFolder, *, locked: bool = False, reach: Callable[[], Reached] = reach_users_ray
) -> Status:
    """What status.json says, corrected by what its user's own Ray says, if that runs it.

    A look: the address in the folder is left alone, for whoever answers there would have this process load
    classes of theirs.

    Args:
        locked: this process holds the run's lock.
        reach: gives the user's own Ray.

    Raises:
        UserError: if what lies in the folder is damaged.
    """
    status = run.read_status()
    if status.state.ended:
        return status
    submission = read_submission(run)
    ray = reach() if is_joined() or not submission.own else Reached()
    if ray.cluster == submission.cluster:
        return status_on_joined(run, actor_name(run.path))
    if run.is_held() and not locked:  # its supervisor and its ranks share the lock
        return status
    if submission.own:  # its Ray ended with whoever submitted it
        return _ended_without_a_word(run, run.read_status())
    other = f"its Ray is that of {submission.cluster}, and the one that was asked that of {ray.cluster}"
    return run.unheard(ray.silence or other)


def asked_status(run: RunFolder) -> Status:
    """The same for who is to act on the run: its Ray is asked, at the address that lies in the folder, and
    an end that its supervisor could not write is written.

    Raises:
        UserError: if the run has not ended, and its Ray cannot be reached from here.
    """
    try:
        rejoin(run)
    except UserError:
        if not read_submission(run).own:
            raise
        status = current_status(run)
    else:
        status = status_on_joined(run, actor_name(run.path))
    if status.state.ended and not run.read_status().state.ended:
        status = status.stopped(status.state, failure=status.failure, at=run.last_sign())
        run.write_status(status)
        notify(run, status)
    return status


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
