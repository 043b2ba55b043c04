"""Telling people that a run has stopped."""

from __future__ import annotations

import json
import logging
import subprocess
import urllib.request

from cluster.run.folder import RunFolder
from cluster.run.restarts import set_aside
from cluster.run.status import Status, why
from cluster.site import Notify, read_site

logger = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds


def notify(run: RunFolder, status: Status) -> None:
    """Tell whom the run's site file names; that it fails is logged, and changes nothing else."""
    path = run.path / "site.yaml"
    try:
        if path.is_file():
            _tell(read_site(path).notify, run, status)
    except Exception as error:  # whatever it is, the run has ended as it has ended
        logger.warning("nobody is told: %s", error)


def _tell(settings: Notify, run: RunFolder, status: Status) -> None:
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
    if settings.command:
        words = f"{values['run']} is {values['state']}: {values['cause']}"
        try:
            subprocess.run([*settings.command, words], input=message, text=True, check=True, timeout=PATIENCE)
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("the site's notify.command failed: %s", error)
    if settings.webhook is not None:
        request = urllib.request.Request(
            settings.webhook, data=message.encode(), headers={"Content-Type": "application/json"}
        )
        try:
            urllib.request.urlopen(request, timeout=PATIENCE).close()
        except OSError as error:
            logger.warning("the site's notify.webhook failed: %s", error)
