"""Deduplication and decontamination: a view without the samples that equal or look like another.

What is a duplicate of what, and which one stays, is decided in `ingest.dedup.duplicates`; how the work is cut
into tasks, in `ingest.dedup.tasks`.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import UserError
from cluster.map.tasks import MapTasks
from ingest.dataset.keys import key_of, slots_of
from ingest.dataset.open import Dataset, open_dataset, sealed_units
from ingest.dataset.records import canonical_json
from ingest.dataset.schema import DUPLICATES_SCHEMA
from ingest.dataset.view import PackedKeeps, refuse_taken_name, write_duplicates, write_view
from ingest.dedup.hamming import MAX_RADIUS
from ingest.dedup.tasks import (
    DATASET_SHIFT,
    ROWS_PER_PARTITION,
    Sources,
    collect,
    partition_tasks,
    scatter,
    scatter_tasks,
    search,
)
from ingest.store.open import absolute


@dataclass(frozen=True, kw_only=True)
class Hot:
    """Buckets of hashes so full that not all their pairs were compared, over all bands and parts."""

    buckets: int = 0
    members: int = 0
    not_compared: int = 0


@dataclass(frozen=True, kw_only=True)
class DedupReport:
    """What was found.

    Attributes:
        root, view: of what, and the view's name.
        samples, kept: of the dataset (or of the view it was seen through) and of the new view.
        exact: dropped, with the bytes of another sample.
        near: dropped, with another's looks only.
        evaluation: how many of these equal or look like an image of an evaluation dataset.
        groups: samples that others were dropped for.
        unhashed: samples without a perceptual hash: only their bytes were compared.
        flat: samples whose hash says too little (single colours, gradients): the same.
        evaluation_unhashed: evaluation images of both kinds: near copies of them may be left.
        compared: pairs of hashes that were looked at.
        hot: what was not.
    """

    root: str
    view: str
    samples: int
    kept: int
    exact: int
    near: int
    evaluation: int
    groups: int
    unhashed: int
    flat: int
    evaluation_unhashed: int
    compared: int
    hot: Hot


def dedup(
    dataset: str | Path,
    name: str,
    *,
    radius: int | None,
    against: Sequence[str] = (),
    within: str | None = None,
    sealed: str | None = None,
    scratch: Path | None = None,
    map_tasks: MapTasks,
    progress: Callable[[str, int, int], None] = lambda doing, done, total: None,
) -> DedupReport:
    """Write a view that keeps one of each group of duplicates, and beside it the list of what was dropped.

    Args:
        dataset: a sealed dataset.
        name: of the new view.
        radius: bits in which perceptual hashes of near duplicates may differ; None for equal bytes only.
        against: datasets whose images, and all that equal or look like them, are dropped.
        within: a view; what it drops is not looked at, and is not in the new one.
        sealed: a root to pin, hex; None takes the latest.
        scratch: where partitions lie meanwhile; by default where temporary files do.
        map_tasks: the executor; if it takes tasks to other machines, all must reach the datasets and
            `scratch` by the same names.
        progress: is told what is being done, how many tasks of it are done, and of how many.

    Raises:
        UserError: there is no such dataset or view, or another view of this name exists.
    """
    if radius is not None and not 0 <= radius <= MAX_RADIUS:
        raise UserError(f"hashes cannot be compared at a distance of {radius}: use 0 to {MAX_RADIUS} bits")
    if scratch is not None and not scratch.is_dir():
        raise UserError(f"--scratch {scratch} is not a folder: name one that exists")
    own = open_dataset(dataset, sealed=sealed, view=within)
    refuse_taken_name(dataset, name, root=own.root)
    others = _evaluations(own, against)
    scratch = None if scratch is None else scratch.resolve()
    # A task that was given up may still write there; what could not be removed must not cost the result.
    with tempfile.TemporaryDirectory(
        prefix="ingest-dedup-", dir=scratch, ignore_cleanup_errors=True
    ) as folder:
        sources = Sources(
            evaluations=tuple((absolute(other.store), other.root) for other in others),
            path=absolute(own.store),
            root=own.root,
            within=within,
            scratch=folder,
            radius=radius,
            partitions=max(1, -(-sum(map(len, [own, *others])) // ROWS_PER_PARTITION)),
        )
        tasks = scatter_tasks(sources)
        counts = _told(
            map_tasks(scatter, [task.to_json() for task in tasks]), "reading hashes", len(tasks), progress
        )
        searches = partition_tasks(sources, len(tasks))
        found = _told(
            map_tasks(search, [task.to_json() for task in searches]), "comparing", len(searches), progress
        )
        drops = collect(searches)
    keys = drops["id"] - np.uint64(sources.first_own)
    write_view(dataset, name, root=own.root, keeps=_keeps(own, keys))
    write_duplicates(dataset, name, _duplicates_table(sources, drops))
    own_counts = [row for task, row in zip(tasks, counts, strict=True) if task.dataset == len(others)]
    unhashed, flat = (sum(row[column] for row in own_counts) for column in (0, 1))
    compared, buckets, members, not_compared = (sum(column) for column in zip(*found, strict=True))
    return DedupReport(
        root=own.root,
        view=name,
        samples=len(own),
        kept=len(own) - len(drops),
        exact=int(drops["exact"].sum()),
        near=int((~drops["exact"]).sum()),
        evaluation=int((drops["winner"] < sources.first_own).sum()),
        groups=len(np.unique(drops["winner"])),
        unhashed=unhashed,
        flat=flat,
        evaluation_unhashed=sum(map(sum, counts)) - unhashed - flat,
        compared=compared,
        hot=Hot(buckets=buckets, members=members, not_compared=not_compared),
    )


def _evaluations(own: Dataset, against: Sequence[str]) -> list[Dataset]:
    """What the dataset is compared against."""
    others = [open_dataset(path) for path in against]
    for path, other in zip(against, others, strict=True):
        if other.root == own.root:
            raise UserError(f"{path} is the dataset itself: comparing it against itself would leave nothing")
    return others


def _keeps(own: Dataset, dropped: NDArray[np.uint64]) -> PackedKeeps:
    """Every unit with samples, in the view or not; `dropped` are keys, ascending."""
    keeps = PackedKeeps()
    sealed = sealed_units(own.path, own.root, columns=["unit", "kept"])
    for unit, slots in zip(sealed["unit"].to_pylist(), sealed["kept"].to_pylist(), strict=True):
        if slots:
            stays = np.ones(slots, bool) if own.view is None else own.view.of_slots(unit, slots)
            edges = np.array([key_of(unit, 0), key_of(unit + 1, 0)], np.uint64)
            first, last = np.searchsorted(dropped, edges)
            stays[slots_of(dropped[first:last])] = False
            keeps.add(unit, stays)
    return keeps


def _duplicates_table(sources: Sources, drops: NDArray[Any]) -> pa.Table:
    """Sorted by winner; evaluation images first, each evaluation by its place in the metadata's list."""
    drops = drops[np.lexsort((drops["id"], drops["winner"]))]
    mask = np.uint64((1 << DATASET_SHIFT) - 1)
    source = (drops["winner"] >> np.uint64(DATASET_SHIFT)).astype(np.uint16)
    settings = {"hamming": sources.radius, "against": [root for _, root in sources.evaluations]}
    return pa.table(
        {
            "winner": drops["winner"] & mask,
            "key": drops["id"] & mask,
            "distance": drops["distance"],
            "exact": drops["exact"],
            "evaluation": pa.array(source, mask=source == len(sources.evaluations)),
        },
        schema=DUPLICATES_SCHEMA.with_metadata({"root": sources.root, "settings": canonical_json(settings)}),
    )


def _told(results: Any, doing: str, total: int, progress: Callable[[str, int, int], None]) -> list[Any]:
    progress(doing, 0, total)
    answers = []
    for done, answer in enumerate(results, 1):
        answers.append(answer)
        progress(doing, done, total)
    return answers
