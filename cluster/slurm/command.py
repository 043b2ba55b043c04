"""Calling SLURM's commands, as if from no job."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

from cluster.errors import UserError

PATIENCE = 60.0  # seconds for one command
# Of an enclosing job or rank: in a new job they would lie. SLURM_CONF says where the cluster is, and stays.
# SBATCH_ variables go before the script's own options: what --dry-run prints would not be what runs.
# SQUEUE_ variables leave out what their user does not want to see.
INHERITED = re.compile(
    r"(SLURM_(?!CONF$)|SBATCH_|SRUN_|SQUEUE_|SUBMITIT_|PMI|CUDA_VISIBLE_DEVICES$|SUBMIT_START$|SUBMIT_ENDS$).*"
)
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SUBMIT_STORE", "SUBMIT_PEERS")


def call(
    command: Sequence[str], *, text: str = "", patience: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """One SLURM command, with nothing of an enclosing job in its environment, and `text` to read.

    Raises:
        UserError: if there is no such command, or it does not answer in `patience` seconds.
    """
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=patience,
            env=clean_environment(os.environ),
            input=text,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]} does not answer: {error}") from error


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what an enclosing job or rank has set for itself."""
    return {
        name: value
        for name, value in environment.items()
        if name not in PLACES and not INHERITED.fullmatch(name)
    }


def id_in(stdout: str) -> str:
    """The id among what `sbatch --parsable` says: at some sites it is a wrapper that says more.

    Raises:
        UserError: if there is none.
    """
    ids = re.findall(r"^\s*(\d+)(?:;\S+)?\s*$", stdout, re.MULTILINE)
    if not ids:
        raise UserError(
            f"sbatch took the job and named no id, but {stdout.strip()!r:.300}: see `squeue --me`, cancel it "
            "there, and have a wrapper of sbatch hand on what --parsable asks for"
        )
    return str(ids[-1])
