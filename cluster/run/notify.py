"""Telling people that a run has stopped.

A compute node often has no way out. Whom it could not tell is told by who looks next from elsewhere, with the
right to act on the run: its watcher, or the next command that submits or cancels it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import subprocess
import urllib.request
from collections.abc import Collection
from pathlib import Path

from cluster.atomic_file import write_atomically
from cluster.run.folder import RunFolder
from cluster.run.restarts import set_aside
from cluster.run.status import Status, why
from cluster.site import Notify, read_site
from cluster.small_file import read_small

logger = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds
WAYS = ("command", "webhook")


def notify(run: RunFolder, status: Status, ways: Collection[str] = WAYS) -> None:
    """Tell whom the run's site file names; that it fails is logged and kept, and changes nothing else.

    Args:
        ways: of the site's `notify`, those to use.
    """
    path = run.path / "site.yaml"
    try:
        settings = read_site(path).notify if path.is_file() else Notify()
        with contextlib.suppress(OSError):  # SLURM may end this process while it waits for an answer
            _keep(run, [way for way in WAYS if way in ways and getattr(settings, way)])
        _keep(run, _tell(settings, run, status, ways))
    except Exception as error:  # whatever it is, the run has ended as it has ended
        logger.warning("nobody is told: %s", error)


def tell_the_untold(run: RunFolder) -> None:
    """Try again from here what could not be told where the run had ended."""
    try:
        if is_untold(run) and (status := run.read_status()).state.ended:
            notify(run, status, json.loads(read_small(_untold(run))))
    except Exception as error:
        logger.warning("nobody is told: %s", error)


def is_untold(run: RunFolder) -> bool:
    """Whether somebody has still to be told how the run ended."""
    return _untold(run).is_file()


def _untold(run: RunFolder) -> Path:
    """Names the ways by which the end could not be told."""
    return run.path / "untold.json"


def _keep(run: RunFolder, untold: list[str]) -> None:
    if untold:
        write_atomically(_untold(run), json.dumps(untold) + "\n")
    else:
        _untold(run).unlink(missing_ok=True)


def _tell(settings: Notify, run: RunFolder, status: Status, ways: Collection[str]) -> list[str]:
    """Returns the ways that failed."""
    failure = status.failure
    values = {
        "run": run.path.name,
        "folder": str(run.path),
        "state": str(status.state),
        "cause": why(status).partition("\n")[0],
        "rank": None if failure is None else failure.rank,
        "node": None if failure is None else failure.node,
        "attempt": status.attempt,
        "set_aside": set_aside(run),
    }
    message = json.dumps(values)
    failed = []
    if settings.command and "command" in ways:
        words = f"{values['run']} is {values['state']}: {values['cause']}"
        try:
            subprocess.run([*settings.command, words], input=message, text=True, check=True, timeout=PATIENCE)
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("the site's notify.command failed: %s", error)
            failed.append("command")
    if settings.webhook is not None and "webhook" in ways:
        request = urllib.request.Request(
            settings.webhook, data=message.encode(), headers={"Content-Type": "application/json"}
        )
        try:
            urllib.request.urlopen(request, timeout=PATIENCE).close()
        except (OSError, http.client.HTTPException) as error:
            logger.warning("the site's notify.webhook failed: %s", error)
            failed.append("webhook")
    return failed
