"""Everything that is known of a run, from its folder and from who runs it, for whoever looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.run.folder import RunFolder
from cluster.run.restarts import newest_checkpoint, read_restarts, set_aside
from cluster.run.status import Status, explain
from cluster.small_file import read_small
from cluster.typed_json import read_record
from pipeline.train.branch import read_parent
from pipeline.train.steering import read_changes

UNREADABLE = "unreadable"  # in place of a state: what lies in the folder does not tell one


@dataclass(frozen=True, kw_only=True)
class LatestStep:
    """How far a run is, as its first rank has written into progress.json.

    Attributes:
        loss: None if it is not finite.
        seconds_left: at the present rate.
        waits_for: of a crawl whose end waits for one site: what is left of it.
        warnings: in words.
    """

    step: int
    total_steps: int
    loss: float | None = None
    images_per_second: float | None = None
    seconds_left: float = 0.0
    waits_for: str = ""
    warnings: tuple[str, ...] = ()


def name_in(folder: Path, run: RunFolder) -> str:
    """What a run is called below a folder: by its name, of a graph's with the graph's."""
    return str(run.path.relative_to(folder)) if run.path.is_relative_to(folder) else run.path.name


def look_at(run: RunFolder, name: str, status: Callable[[RunFolder], Status]) -> dict[str, Any]:
    """Everything that is known of a run, as plain values. One that cannot be read hides no other.

    Args:
        status: tells its state, see `cluster.executors.Look`.
    """
    place = {"run": name, "folder": str(run.path)}
    try:
        return place | _known(run, status(run))
    except UserError as error:
        why = str(error)
    except OSError as error:
        why = f"{error.filename or run.path}: {error.strerror}"
    except Exception as error:  # whatever somebody has put there
        why = f"{run.path} is damaged: {type(error).__name__}: {error}"
    return place | {"state": UNREADABLE, "why": why}


def _known(run: RunFolder, now: Status) -> dict[str, Any]:
    progress, parent = read_latest_step(run), read_parent(run.path)
    watched_by_nobody = not now.state.ended and run.unwatched.is_file()
    return {
        **now.to_json(),
        "why": explain(now),
        "gpu_hours": round(now.until_now().gpu_hours, 3),
        "checkpoint": newest_checkpoint(run),
        "set_aside": set_aside(run),
        "unwatched": read_small(run.unwatched, links=False).decode(errors="replace").strip()
        if watched_by_nobody
        else "",
        "restarts": [asdict(restart) for restart in read_restarts(run)],
        "parent": None if parent is None else asdict(parent),
        "changes": [asdict(change) for change in read_changes(run.path)],
        "progress": {} if progress is None else asdict(progress),
    }


def read_latest_step(run: RunFolder) -> LatestStep | None:
    """What the first rank said last; None if it has not said anything yet."""
    path = run.path / "progress.json"
    remedy = "remove it: the run writes it anew"
    return read_record(LatestStep, path, remedy=remedy) if path.exists() else None
