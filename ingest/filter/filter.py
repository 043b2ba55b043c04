"""Views by filtering: conditions on columns, removals and picks by lists, intersections with other views, and
draws of so many images of each label.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import UserError
from cluster.map.tasks import MapTasks
from ingest.dataset.keys import keys_of
from ingest.dataset.open import Dataset, open_dataset
from ingest.dataset.view import PackedKeeps, read_view, refuse_taken_name, write_view
from ingest.dataset.vocabulary import Vocabulary
from ingest.filter.condition_text import Condition, parse
from ingest.filter.conditions import DERIVED, columns_of, evaluate, lacking
from ingest.filter.per_label import ENTRY, Drawn, PerLabel, bits_of, entries_of, first_of_each, sum_up
from ingest.filter.sample_list import SampleList, read_sample_list

ROWS_PER_TASK = 1 << 19
UNMATCHED_NAMED = 20


@dataclass(frozen=True, kw_only=True)
class Filter:
    """What a sample must fulfil: all of it.

    Attributes:
        within: views that must have it.
        remove: lists that must not name it.
        keep: lists that must name it.
        where: conditions on its columns, as typed.
        per_label: of those that fulfil all else, so many of each label; None for all.
    """

    within: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    per_label: PerLabel | None = None

    @property
    def lists(self) -> tuple[str, ...]:
        return self.remove + self.keep

    @property
    def steps(self) -> list[str]:
        """What drops samples, in the order in which it is asked."""
        return [
            *(f"within {name}" for name in self.within),
            *(f"remove {path}" for path in self.remove),
            *(f"keep {path}" for path in self.keep),
            *(f"where {text}" for text in self.where),
            *(f"{each.count} per label, seed {each.seed}" for each in [self.per_label] if each is not None),
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class FilterTask:
    """Units first to last - 1 of a dataset; the filter's lists and conditions were read once."""

    path: str
    root: str
    filter: Filter
    lists: tuple[Path, ...]
    conditions: tuple[Condition, ...]
    first: int
    last: int


@dataclass(frozen=True, kw_only=True, eq=False)
class FilteredUnits:
    """A task's answer.

    Attributes:
        keeps: for each unit its number and whether each slot stays.
        dropped, null: by each step, and those of them for a null; (steps,) int64. A sample counts for the
            first step that drops it.
        matched: of each list, the entries that name a sample of these units.
        named: how many samples each list names, (lists,) int64.
        drawn: the first of each label among those that stay, (n,) `ENTRY`.
    """

    keeps: list[tuple[int, NDArray[np.bool_]]]
    dropped: NDArray[np.int64]
    null: NDArray[np.int64]
    matched: list[NDArray[np.int64]]
    named: NDArray[np.int64]
    drawn: NDArray[np.void]


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """What one step dropped of what those before it had left; `null` of these for want of a value."""

    step: str
    dropped: int
    null: int


@dataclass(frozen=True, kw_only=True)
class Matched:
    """What became of a list.

    Attributes:
        lines: that it has.
        unmatched: those that name no sample of the dataset.
        named: the first few of these.
        by_file_name: it has nothing but file names, which were compared with the last part of each URL.
        samples: those that it names.
        example: if it names none, what the dataset calls its first sample.
    """

    path: str
    lines: int
    unmatched: int
    named: tuple[str, ...]
    by_file_name: bool
    samples: int
    example: str | None


@dataclass(frozen=True, kw_only=True)
class FilterReport:
    """What a filter made of a dataset's samples: samples = kept + all that was dropped."""

    root: str
    view: str
    samples: int
    kept: int
    steps: tuple[Dropped, ...]
    lists: tuple[Matched, ...]
    drawn: Drawn | None


def filter_view(
    dataset: str | Path,
    name: str,
    wanted: Filter,
    *,
    sealed: str | None = None,
    map_tasks: MapTasks,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FilterReport:
    """Write a view of the samples that a filter lets through; none if it lets nothing through.

    Args:
        dataset: a sealed dataset.
        name: of the new view.
        wanted: the filter.
        sealed: the root to make it of, hex; None for the latest.
        map_tasks: the executor.
        progress: is told how many units are done, and of how many.

    Raises:
        UserError: a view, list, column or condition is not there or not right, or another view of this name
            exists.
    """
    opened = open_dataset(dataset, sealed=sealed)
    refuse_taken_name(dataset, name, root=opened.root)
    lists = tuple(map(read_sample_list, wanted.lists))
    for view in wanted.within:
        read_view(dataset, view, root=opened.root)
    conditions = tuple(map(parse, wanted.where))
    _check_columns(opened, conditions)
    if wanted.per_label is not None and not len(opened.vocabulary):  # read here, so that it is made only once
        raise UserError(
            f"{dataset} has no label to draw images of: crawl it with --labels-from or --labels, or leave "
            "--per-label out"
        )
    keeps = PackedKeeps()
    named = np.zeros(len(lists), np.int64)
    drawn = np.empty(0, ENTRY)
    dropped = np.zeros((2, len(wanted.steps)), np.int64)
    matched = [np.zeros(len(listed.lines), bool) for listed in lists]
    with TemporaryDirectory(prefix="ingest-") as folder:
        places = tuple(Path(folder, str(number)) for number in range(len(lists)))
        for listed, place in zip(lists, places, strict=True):
            listed.save(place)
        tasks = _tasks(opened, wanted, places, conditions)
        for task, answer in zip(tasks, map_tasks(filter_units, tasks), strict=True):
            for unit, stays in answer.keeps:
                keeps.add(unit, stays)
            dropped += [answer.dropped, answer.null]
            named += answer.named
            drawn = np.concatenate([drawn, answer.drawn])
            for seen, entries in zip(matched, answer.matched, strict=True):
                seen[entries] = True
            progress(task.last, len(opened.units))
    summary = None
    if wanted.per_label is not None:
        keeps, dropped[0, -1], summary = _draw(wanted.per_label, drawn, keeps, opened.vocabulary)
    kept = len(opened) - int(dropped[0].sum())
    if kept:  # views are for good: nobody can use an empty one, and it would take the name of the right one
        write_view(dataset, name, root=opened.root, keeps=keeps)
    return FilterReport(
        root=opened.root,
        view=name,
        samples=len(opened),
        kept=kept,
        steps=tuple(
            Dropped(step=step, dropped=count, null=null)
            for step, count, null in zip(wanted.steps, *dropped.tolist(), strict=True)
        ),
        lists=tuple(
            _matched(opened, path, listed, seen, by_file_name=by_name, samples=samples)
            for path, listed, seen, by_name, samples in zip(
                wanted.lists, lists, matched, _by_file_name(wanted, lists), named.tolist(), strict=True
            )
        ),
        drawn=summary,
    )


def _draw(
    wanted: PerLabel, entries: NDArray[np.void], keeps: PackedKeeps, vocabulary: Vocabulary
) -> tuple[PackedKeeps, int, Drawn]:
    """What a draw leaves of what the other steps keep, and how many images it drops of that."""
    first = first_of_each(entries, wanted.count)
    keys = np.unique(first["key"])
    before = sum(int(bits.sum()) for bits in keeps.values())
    return bits_of(keys, keeps), before - len(keys), sum_up(first, wanted.count, vocabulary.labels)


def filter_units(task: FilterTask) -> FilteredUnits:
    """Decide every sample of some units."""
    wanted = task.filter
    opened = open_dataset(task.path, sealed=task.root)
    views = [read_view(task.path, view, root=task.root) for view in wanted.within]
    lists = list(map(SampleList.load, task.lists))
    columns = set[str]().union(*map(columns_of, task.conditions))
    columns |= {"url"} if any(len(listed.urls) for listed in lists) else set()
    columns |= {"sha256"} if wanted.per_label is not None else set()
    by_file_name = _by_file_name(wanted, lists)
    answer = FilteredUnits(
        keeps=[],
        dropped=np.zeros(len(wanted.steps), np.int64),
        null=np.zeros(len(wanted.steps), np.int64),
        matched=[np.empty(0, np.int64) for _ in lists],
        named=np.zeros(len(lists), np.int64),
        drawn=np.empty(0, ENTRY),
    )
    drawn = []
    indices = range(task.first, task.last)
    for index, rows in zip(indices, opened.kept_rows_of(indices, sorted(columns)), strict=True):
        unit = int(opened.units[index])
        passes = [view.of_slots(unit, len(rows)) for view in views]
        found = [_listed(*each, unit, rows) for each in zip(lists, by_file_name, strict=True)]
        passes += [~named for named, _ in found[: len(wanted.remove)]]
        passes += [named for named, _ in found[len(wanted.remove) :]]
        stays = np.ones(len(rows), bool)
        verdicts = [evaluate(condition, rows) for condition in task.conditions]
        nobody = np.zeros(len(rows), bool)
        nulls = [nobody for _ in passes]
        passes += [verdict.fits for verdict in verdicts]
        nulls += [verdict.null for verdict in verdicts]
        for step, (fits, null) in enumerate(zip(passes, nulls, strict=True)):
            answer.dropped[step] += int((stays & ~fits).sum())
            answer.null[step] += int((stays & null).sum())
            stays &= fits
        answer.keeps.append((unit, stays))
        for number, (there, entries) in enumerate(found):
            answer.matched[number] = np.union1d(answer.matched[number], entries)
            answer.named[number] += int(there.sum())
        if wanted.per_label is not None:
            drawn.append(entries_of(wanted.per_label, unit, rows, opened.unit_labels(index), stays))
    if wanted.per_label is None or not drawn:
        return answer
    return replace(answer, drawn=first_of_each(np.concatenate(drawn), wanted.per_label.count))


def _tasks(
    opened: Dataset, wanted: Filter, lists: tuple[Path, ...], conditions: tuple[Condition, ...]
) -> list[FilterTask]:
    step = (np.cumsum(opened.counts) - opened.counts) // ROWS_PER_TASK
    starts = [*np.flatnonzero(np.diff(step, prepend=-1)).tolist(), len(step)]
    return [
        FilterTask(
            path=opened.path,
            root=opened.root,
            filter=wanted,
            lists=lists,
            conditions=conditions,
            first=first,
            last=last,
        )
        for first, last in pairwise(starts)
    ]


def _check_columns(opened: Dataset, conditions: Sequence[Condition]) -> None:
    """Decide each condition once per generation, whose units have the same columns: mistakes show at once."""
    samples = [opened.kept_rows(index) for index in opened.unit_of_each_generation()]
    for condition in conditions:
        for rows in samples:
            evaluate(condition, rows)
        nowhere = set(condition.columns).intersection(*(lacking(condition, rows) for rows in samples))
        if samples and nowhere:
            names = {name for rows in samples for name in rows.column_names} | set(DERIVED)
            raise UserError(
                f"--where '{condition.text}': the dataset has no column {min(nowhere)}; it has "
                + ", ".join(sorted(names - {"status", "reason", "retryable"}))
            )


def _by_file_name(wanted: Filter, lists: Sequence[SampleList]) -> list[bool]:
    """Which lists are compared by file name. None of those to remove: a name alone may be that of many."""
    return [
        number >= len(wanted.remove) and listed.has_only_file_names for number, listed in enumerate(lists)
    ]


def _listed(
    listed: SampleList, by_file_name: bool, unit: int, rows: pa.Table
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    keys = keys_of(unit, rows["slot"].to_numpy())
    return listed.find(keys, rows["url"] if len(listed.urls) else None, by_file_name=by_file_name)


def _matched(
    opened: Dataset,
    path: str,
    listed: SampleList,
    matched: NDArray[np.bool_],
    *,
    by_file_name: bool,
    samples: int,
) -> Matched:
    entries = np.flatnonzero(~matched)
    return Matched(
        path=path,
        lines=int(listed.lines.sum()),
        unmatched=int(listed.lines[entries].sum()),
        named=tuple(listed.names(entries[:UNMATCHED_NAMED].tolist())),
        by_file_name=by_file_name,
        samples=samples,
        example=None if samples or not len(opened) else opened.kept_rows(0, ["url"])["url"][0].as_py(),
    )
