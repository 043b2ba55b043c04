"""The row that `ingest doctor` has about the fence."""

import json
import subprocess
import sys

from cluster.doctor import Finding
from ingest.fence.fence import PARTS, environment

MEND = (
    "Linux 5.13 on x86-64 or aarch64 that has CONFIG_SECCOMP_FILTER, and landlock among its security modules "
    "(/sys/kernel/security/lsm); in a container, a profile that allows both"
)


def fence_check() -> Finding:
    """What keeps the processes that decode images and read lists from doing anything else."""
    # It cannot be taken down again: a process of its own puts it up.
    command = [sys.executable, "-P", "-m", "ingest.fence.fence"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment(), check=True
        )
        up: list[str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        words = getattr(error, "stderr", None) or str(error)
        remedy = "mend what it says: images and lists are read in such processes only"
        return Finding(name="fence", status="missing", detail=words[-500:], remedy=remedy, required=True)
    detail = f"decoders and readers of lists: bounded, without credentials, {', '.join(up)}"
    if missing := [part for part in PARTS if part not in up]:
        return Finding(
            name="fence", status="warning", detail=f"{detail}; not {', '.join(missing)}", remedy=MEND
        )
    return Finding(name="fence", status="ok", detail=detail)
