"""Telling people that a run has stopped."""

from __future__ import annotations

import json
import logging
import subprocess
import urllib.request

from cluster.runs import RunFolder, Status, explain
from cluster.site import Notify

logger = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds


def notify(settings: Notify, run: RunFolder, status: Status) -> None:
    """Call the site's command and webhook; that one of them fails is logged, and changes nothing else."""
    failure = status.failure
    values = {
        "run": run.path.name,
        "folder": str(run.path),
        "state": str(status.state),
        "cause": explain(status).splitlines()[0],
        "rank": None if failure is None else failure.rank,
        "node": None if failure is None else failure.node,
        "attempt": status.attempt,
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
