"""What SLURM and Ray say of runs that have not ended, asked for all of them at once, by a process of its own.

Who joins a Ray ends with it, changes its working directory and keeps threads: the page does not.

    python -m pipeline.serve.asked < folders, a line each
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cluster.executors import Look
from cluster.run.folder import RunFolder
from cluster.run.status import Status
from cluster.typed_json import parse_record

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds


def ask(runs: Sequence[RunFolder]) -> dict[Path, Status]:
    """Folder → status, of those of which there is something to say."""
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-m", "pipeline.serve.asked"],  # nothing of the folder that this runs in
            input=json.dumps([str(run.path) for run in runs]),
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE,
            start_new_session=True,  # Ctrl-C is for who serves
        ).stdout
        found = json.loads(answer.splitlines()[-1])
        return {
            Path(folder): parse_record(Status, json.dumps(values), where=folder, remedy="look again")
            for folder, values in found.items()
        }
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        logger.warning("SLURM and Ray could not be asked about runs: %s", error)
        return {}


def main() -> None:
    """Read folders, and print what is known, as one line of JSON."""
    runs = [RunFolder(Path(folder)) for folder in json.load(sys.stdin)]
    look, found = Look(runs), {}
    for run in runs:
        with suppress(Exception):  # whatever lies there; it is told of where that run itself is looked at
            found[str(run.path)] = look.status(run).to_json()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
