"""`submit dag --plan`: a graph with what is finished, stale, running or missing, as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.executors import Look
from cluster.job import State
from cluster.run.status import in_words
from pipeline.dag.ensure import find_receipt
from pipeline.dag.stage import Stage, job_folder


class StageState(StrEnum):
    """How far a stage is."""

    FINISHED = "finished"
    RUNNING = "running"
    QUEUED = "queued"
    FAILED = "failed"
    CANCELLED = "cancelled"  # a stage before it failed, or somebody ended it
    STALE = "stale"  # finished once, with another recipe or other inputs
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage of a graph; `detail` is the time it took, or the job that makes it."""

    stage: Stage
    state: StageState
    detail: str


def look_at_stages(stages: Sequence[Stage]) -> list[Row]:
    """Look at every stage; starts nothing."""
    look = Look([job_folder(stage) for stage in stages])
    return [_look_at(stage, look) for stage in stages]


def _look_at(stage: Stage, look: Look) -> Row:
    if (receipt := find_receipt(stage)) is not None:
        return Row(stage=stage, state=StageState.FINISHED, detail=f"{receipt.seconds:.1f} s")
    run = job_folder(stage)
    status = look.status(run) if (run.path / "status.json").is_file() else None
    if status is not None and not status.state.ended:
        state = StageState.QUEUED if status.state is State.PENDING else StageState.RUNNING
        plain = status.state in (State.PENDING, State.RUNNING)
        told = "" if plain else f", {in_words(status.state, reason=status.reason, since=status.since)}"
        return Row(stage=stage, state=state, detail=f"{status.executor} {status.id}{told}")
    if status is not None and status.state is not State.COMPLETED:
        state = StageState.CANCELLED if status.state is State.CANCELLED else StageState.FAILED
        return Row(stage=stage, state=state, detail=f"{status.executor} {status.id}")
    latest = stage.root / "latest" / stage.name
    if latest.is_symlink() and latest.resolve().name != stage.folder.name:
        return Row(stage=stage, state=StageState.STALE, detail=f"was {latest.resolve().name}")
    return Row(stage=stage, state=StageState.MISSING, detail="")


def progress_text(rows: Sequence[Row]) -> str:
    """A line per stage: its state, its folder, and what it waits for."""
    width = max(len(row.stage.name) for row in rows)
    detail = max(len(row.detail) for row in rows)
    lines = []
    for row in rows:
        sources = row.stage.sources
        after = f"  after {', '.join(sources)}" if sources else ""
        name, folder = row.stage.name, row.stage.folder.name
        lines.append(f"{name:<{width}}  {row.state:<9}  {row.detail:<{detail}}  {folder}{after}")
    return "\n".join(lines)
