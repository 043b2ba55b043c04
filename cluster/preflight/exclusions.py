"""Nodes that failed a preflight and are kept out of later runs: `excluded-nodes.json` beside the runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.file_lock import lock_file
from cluster.preflight.verdict import Verdict
from cluster.typed_json import read_record

FILE = "excluded-nodes.json"
LARGEST_SHARE = 4  # a quarter of the nodes


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """One node that is not to be used, why, and since when (seconds since the epoch)."""

    node: str
    reasons: tuple[str, ...]
    time: float


def exclude(runs_folder: Path, verdicts: Sequence[Verdict]) -> list[str]:
    """Keep the nodes that failed out of later runs. One that is out already gets its newest reasons.

    Returns:
        The names of the nodes that failed. A node that never told its name cannot be kept out.

    Raises:
        UserError: if more than a quarter of the nodes failed (of less than four: more than one, or all).
    """
    failed = [verdict for verdict in verdicts if not verdict.fit]
    if not failed:
        return []
    if len(failed) > max(1, len(verdicts) // LARGEST_SHARE) or len(failed) == len(verdicts):
        raise UserError(
            f"{len(failed)} of {len(verdicts)} nodes failed the preflight, too many to exclude: something "
            "common to them is wrong, such as the network, the shared folder or the container; nothing was "
            f"excluded. The first: {failed[0].node}: {failed[0].reasons[0]}"
        )
    named = [verdict for verdict in failed if verdict.named]
    with _locked(runs_folder):
        kept = {each.node: each for each in exclusions(runs_folder)}
        for verdict in named:
            kept[verdict.node] = Exclusion(node=verdict.node, reasons=verdict.reasons, time=time.time())
        _write(runs_folder, list(kept.values()))
    return [verdict.node for verdict in named]


def exclusions(runs_folder: Path) -> list[Exclusion]:
    """All nodes that are kept out, the longest first."""
    path = runs_folder / FILE
    remedy = "remove it: the nodes that were excluded are used again, until a preflight finds them unfit"
    return read_record(list[Exclusion], path, remedy=remedy) if path.exists() else []


def excluded_nodes(runs_folder: Path) -> list[str]:
    """The names that a launcher passes on as `--exclude=`."""
    return [each.node for each in exclusions(runs_folder)]


def readmit(runs_folder: Path, node: str) -> None:
    """Use a node again.

    Raises:
        UserError: if it is not kept out.
    """
    with _locked(runs_folder):
        before = exclusions(runs_folder)
        after = [each for each in before if each.node != node]
        if len(after) == len(before):
            known = ", ".join(each.node for each in before) or "none"
            raise UserError(f"{node} is not excluded in {runs_folder / FILE}; excluded nodes: {known}")
        _write(runs_folder, after)


def _write(runs_folder: Path, rows: list[Exclusion]) -> None:
    text = json.dumps([asdict(row) for row in rows], indent=2)
    write_atomically(runs_folder / FILE, text + "\n")


@contextmanager
def _locked(runs_folder: Path) -> Iterator[None]:
    """One change at a time: two that read the same list would lose one of their nodes."""
    runs_folder.mkdir(parents=True, exist_ok=True)
    path = runs_folder / f".{FILE}.lock"
    with path.open("a") as file:
        lock_file(file, path, wait=True)
        yield
