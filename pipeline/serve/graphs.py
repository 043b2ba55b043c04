"""Graphs as their receipts tell them: which stage made what, from what, and how far those are that have none,
of which the graph itself says what is planned.

The file that a graph was read from is not needed, and nothing is run or imported to know it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.job import State
from cluster.json_rows import parse_row
from cluster.run.status import in_words
from pipeline.dag.drawing import Box, draw_boxes
from pipeline.dag.planned import PLANNED, Planned, parse_planned
from pipeline.dag.progress import StageState
from pipeline.dag.stage import Receipt, read_receipt
from pipeline.serve.below import read_below
from pipeline.serve.pages import Pages, pages_in_short
from pipeline.serve.run_list import RunList, Stamp, path_id, stamp
from pipeline.train.look import UNREADABLE

DAMAGED = "damaged"  # in place of a state
_STAGE = re.compile(r"[a-z][a-z0-9_]*-[0-9a-f]{12}")
_MOST_PLANNED = 4 << 20  # bytes
_FEW = 400  # characters of a metric, an error or a recipe's value


@dataclass(frozen=True, kw_only=True)
class StageFolder:
    """One stage, by its folder.

    Attributes:
        names: under which graphs point to it now; none once they point elsewhere.
        planned: what the graph says of it, if it is a stage of the one that ran last here.
        receipt: None if it has not finished.
        trouble: why its receipt cannot be read.
    """

    folder: Path
    names: tuple[str, ...] = ()
    planned: Planned | None = None
    receipt: Receipt | None = None
    trouble: str = ""

    @property
    def name(self) -> str:
        """What it is called."""
        if self.names:
            return self.names[0]
        return self.folder.name if self.receipt is None else self.receipt.stage

    @property
    def kind(self) -> str:
        """What it does."""
        return self.folder.name.rpartition("-")[0]

    @property
    def key(self) -> str:
        """What others name it by; "" if nothing tells it."""
        told = self.receipt or self.planned
        return "" if told is None else told.key

    @property
    def inputs(self) -> Mapping[str, str]:
        """Role → key of the stage that fills it, and the path in its folder."""
        told = self.receipt or self.planned
        return {} if told is None else told.inputs


@dataclass
class Graphs:
    """The graphs whose stages lie below a folder. To be looked at by one thread at a time."""

    root: Path
    found: dict[str, list[StageFolder]] = field(default_factory=dict)
    _receipts: dict[Path, tuple[Stamp, StageFolder]] = field(default_factory=dict)

    def look(self) -> Graphs:
        """Look again; a receipt is read once."""
        found, read = {}, {}
        for folder in [self.root, *_folders(self.root)]:
            to_be = _planned(self.root, folder)
            planned, names = {each.folder: each for each in to_be}, _names(folder, to_be)
            stages = []
            for stage in sorted({*_stage_folders(folder), *(folder / name for name in planned)}):
                seen = stamp(stage / "receipt.json")
                before = self._receipts.get(stage)
                if before is None or before[0] != seen:
                    before = seen, _read(stage, there=seen is not None)
                read[stage] = before
                told = planned.get(stage.name)
                stages.append(replace(before[1], names=names.get(stage.name, ()), planned=told))
            if stages:
                found[str(folder.relative_to(self.root.parent))] = stages
        self.found, self._receipts = found, read
        return self

    def stage_of(self, folder: Path) -> StageFolder | None:
        """The stage in a folder, if it is one."""
        return next(
            (each for stages in self.found.values() for each in stages if each.folder == folder), None
        )


def graphs_in_short(graphs: Graphs, runs: RunList) -> list[dict[str, Any]]:
    """All graphs, and how many of their stages are how far."""
    told = []
    for name, stages in graphs.found.items():
        states = [_state(stage, runs)[0] for stage in stages]
        counts = {state: states.count(state) for state in (*StageState, DAMAGED) if state in states}
        told.append({"id": path_id(graphs.root.parent / name), "name": name, "states": counts})
    return told


def graph_in_full(graphs: Graphs, known_as: str, runs: RunList, pages: Pages) -> dict[str, Any]:
    """A graph's stages, each after what it was made from.

    Raises:
        UserError: if there is no such graph.
    """
    for name, stages in graphs.found.items():
        if path_id(graphs.root.parent / name) == known_as:
            by_key = {stage.key: stage for stage in stages if stage.key}
            told = [
                _told(stage, by_key, runs) | {"pages": pages_in_short(pages, below=stage.folder)}
                for stage in _in_order(stages, by_key)
            ]
            return {"name": name, "stages": told, "picture": _picture(told)}
    raise UserError("there is no such graph any more")


def _told(stage: StageFolder, by_key: Mapping[str, StageFolder], runs: RunList) -> dict[str, Any]:
    receipt, (state, detail) = stage.receipt, _state(stage, runs)
    job = _job(stage, runs)
    told: dict[str, Any] = {
        "id": path_id(stage.folder),
        "name": stage.name,
        "current": bool(stage.names)
        or receipt is None
        or not stage.folder.parent.joinpath("latest").is_dir(),
        "also": stage.names[1:],
        "kind": stage.kind,
        "folder": stage.folder.name,
        "state": state,
        "detail": detail,
        "run": None if job is None else job[0],
        "inputs": (inputs := _inputs(stage, by_key)),
        "outputs": [],
        "facts": {},
        "recipe": "",
    }
    if receipt is None:
        return told
    replaced = [str(each["name"]) for each in inputs if each["replaced"]]
    if state is StageState.FINISHED and replaced:
        told |= {"state": StageState.STALE, "detail": f"made from {', '.join(replaced)} as it was before"}
    return told | {
        "outputs": [{"path": path, "sha256": digest} for path, digest in sorted(receipt.outputs.items())],
        "facts": {name: _brief(value) for name, value in receipt.metrics.items()},
        "seconds": receipt.seconds,
        "gpu_hours": receipt.gpu_hours,
        "started": receipt.started,
        "machine": receipt.machine,
        "key": receipt.key,
        "source": _source(runs.folder, stage.folder),
        "data": _data(receipt),
        "recipe": json.dumps(receipt.recipe, indent=2, ensure_ascii=False),
    }


def _inputs(stage: StageFolder, by_key: Mapping[str, StageFolder]) -> list[dict[str, Any]]:
    inputs: list[dict[str, Any]] = []
    for role, text in sorted(stage.inputs.items()):
        key, _, path = text.partition("/")
        source = by_key.get(key)
        inputs.append(
            {
                "role": role,
                "name": key[:12] if source is None else source.name,
                "id": None if source is None else path_id(source.folder),
                "path": path,
                "replaced": source is not None and not source.names and bool(stage.names),
            }
        )
    return inputs


def _picture(told: Sequence[dict[str, Any]]) -> str:
    """The stages that count now, from left to right; the boxes lie in their order, on no ground."""
    boxes: dict[str, Box] = {}
    for stage in told:
        if stage["current"]:
            sources = {each["id"] for each in stage["inputs"]} & boxes.keys()  # made-up ones come later
            boxes[stage["id"]] = Box(
                key=stage["id"],
                name=stage["name"],
                state=StageState.FAILED if stage["state"] == DAMAGED else stage["state"],
                words=stage["state"],
                sources=sorted(sources),
            )
    if not boxes:
        return ""
    drawn, width, height = draw_boxes(list(boxes.values()))
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" text-anchor="middle" role="img" '
        f'aria-label="what was made from what; the list below says the same">{"".join(drawn)}</svg>'
    )


def _state(stage: StageFolder, runs: RunList) -> tuple[str, str]:
    """How far it is, and in a few words why."""
    if stage.trouble:
        return DAMAGED, stage.trouble
    return _unfinished(stage, runs) if stage.receipt is None else _finished(stage, stage.receipt)


def _finished(stage: StageFolder, receipt: Receipt) -> tuple[str, str]:
    gone = [path for path in receipt.outputs if not (stage.folder / path).exists()]
    if gone:
        return StageState.MISSING, f"{gone[0]} is gone: it runs again"
    if not stage.names and (stage.folder.parent / "latest" / receipt.stage).is_symlink():
        return StageState.STALE, "another one has taken its place"
    return StageState.FINISHED, ""


def _unfinished(stage: StageFolder, runs: RunList) -> tuple[str, str]:
    job = _job(stage, runs)
    if job is not None and job[1]["state"] != UNREADABLE:
        known = job[1]
        state = State(known["state"])
        if not state.ended:
            words = in_words(state, reason=known["reason"], since=known["since"])
            return StageState.QUEUED if state is State.PENDING else StageState.RUNNING, words
        if state is not State.COMPLETED:
            how = StageState.CANCELLED if state is State.CANCELLED else StageState.FAILED
            return how, known["why"].partition("\n")[0]
    if (error := _last_line(runs.folder, stage.folder / "error.txt")) is not None:
        return StageState.FAILED, error
    return StageState.MISSING, "begun, and not finished" if stage.folder.exists() else ""


def _job(stage: StageFolder, runs: RunList) -> tuple[str, dict[str, Any]] | None:
    """The run that makes it, by its id: its folder is the stage's own, or lies beside it."""
    entries = runs.entries
    for folder in (stage.folder, stage.folder.parent / "jobs" / stage.folder.name):
        if (entry := entries.get(known_as := path_id(folder))) is not None:
            return known_as, entry.known
    return None


def _in_order(stages: list[StageFolder], by_key: Mapping[str, StageFolder]) -> list[StageFolder]:
    """Each after its inputs; those of which nothing tells them last."""
    by_folder = {stage.folder: stage for stage in stages}
    before = {
        stage.folder: {
            by_key[key].folder for text in stage.inputs.values() if (key := text.partition("/")[0]) in by_key
        }
        for stage in stages
    }
    try:
        order = [by_folder[folder] for folder in TopologicalSorter(before).static_order()]
    except CycleError:  # receipts that somebody has made up
        order = list(stages)
    return sorted(order, key=lambda stage: not stage.key)


def _stage_folders(folder: Path) -> Iterator[Path]:
    return (each for each in _folders(folder) if _STAGE.fullmatch(each.name))


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _planned(root: Path, folder: Path) -> list[Planned]:
    """The stages of the graph that ran last here; none of an older version's."""
    path = folder / PLANNED
    try:
        found = parse_planned(read_below(root, path, most=_MOST_PLANNED), where=str(path))
    except (OSError, UserError):  # receipts tell what there is without it
        return []
    return [each for each in found if _STAGE.fullmatch(each.folder)]


def _names(folder: Path, planned: Sequence[Planned]) -> dict[str, tuple[str, ...]]:
    """Name of a stage's folder → its names: as planned, else as of the graph that finished it."""
    now = {each.name: each.folder for each in planned}
    found: dict[str, tuple[str, ...]] = {}
    for name, target in (_pointed_to(folder) | now).items():
        found[target] = (*found.get(target, ()), name)
    return found


def _pointed_to(folder: Path) -> dict[str, str]:
    """The names of finished stages → the names of their folders."""
    try:
        with os.scandir(folder / "latest") as entries:
            links = sorted(entry.name for entry in entries if entry.is_symlink())
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # none yet, or none for us
        return {}
    found = {}
    for name in links:
        with suppress(FileNotFoundError):  # a link that has just taken its name, see `point_to`
            found[name] = (folder / "latest" / name).readlink().name
    return found


def _read(folder: Path, *, there: bool) -> StageFolder:
    if not there:
        return StageFolder(folder=folder)
    try:
        return StageFolder(folder=folder, receipt=read_receipt(folder / "receipt.json"))
    except UserError as error:
        return StageFolder(folder=folder, trouble=str(error))


def _source(root: Path, folder: Path) -> str:
    """The version of the code that made it, as a run's starts tell it."""
    try:
        rows = read_below(root, folder / "attempts.jsonl", most=8 << 20).splitlines()
    except OSError:
        return ""
    last = parse_row(rows[-1]) if rows else None
    told = [(last or {}).get(key) for key in ("version", "commit")]
    return " ".join(value[:12] for value in told if isinstance(value, str))


def _data(receipt: Receipt) -> str:
    """The data from outside of the graph that its recipe names."""
    recipe, section = receipt.recipe, receipt.recipe.get("data")
    named = [recipe.get("source"), recipe.get("images"), recipe.get("path")]
    if isinstance(section, dict) and "data" not in receipt.inputs:
        named += [section.get("root"), section.get("sealed")]
    return ", ".join(value for value in named if isinstance(value, str) and value)[:_FEW]


def _last_line(root: Path, path: Path) -> str | None:
    try:
        lines = read_below(root, path, most=1 << 20).decode(errors="replace").strip().splitlines()
    except OSError:
        return None
    return lines[-1][:_FEW] if lines else ""


def _brief(value: Any) -> str:
    text = (
        f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    )
    return text if len(text) <= _FEW else f"{text[: _FEW - 1]}…"
