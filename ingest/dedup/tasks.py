"""The tasks of a deduplication: scatter units' hashes to partitions, search each partition, collect.

Functions of tasks as JSON, which leave what they find on scratch disk: any executor can map them, and a task
that is done again writes the same. Disk: 24 bytes per sample, and 16 * (radius + 1) more for near duplicates.
A task's memory is bounded by ROWS_PER_TASK and ROWS_PER_PARTITION; `collect` holds 17 bytes for each pair
that looks alike and 18 for each sample that is dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ingest.dataset.keys import keys_of
from ingest.dataset.open import Dataset, open_dataset
from ingest.dedup import duplicates
from ingest.dedup.partition import read_partition, whole_file

ROWS_PER_TASK = 1 << 20
ROWS_PER_PARTITION = 1 << 22
# An id is the dataset's number, those of evaluations first, and the sample's key.
DATASET_SHIFT = 48


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What is compared: evaluation datasets (path, root), and the dataset itself with its view.

    Paths are absolute, and `scratch` is a folder that all tasks can reach; `radius` is None for exact
    duplicates only.
    """

    evaluations: tuple[tuple[str, str], ...]
    path: str
    root: str
    within: str | None
    scratch: str
    radius: int | None
    partitions: int

    def open(self, number: int) -> Dataset:
        """Evaluations come first, the dataset itself last."""
        if number < len(self.evaluations):
            path, root = self.evaluations[number]
            return open_dataset(path, sealed=root)
        return open_dataset(self.path, sealed=self.root, view=self.within)

    @property
    def first_own(self) -> int:
        return len(self.evaluations) << DATASET_SHIFT

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `asdict` made, and JSON may have carried."""
        return cls(**{**values, "evaluations": tuple((path, root) for path, root in values["evaluations"])})


@dataclass(frozen=True, kw_only=True)
class ScatterTask:
    """Units first to last - 1 of one dataset; the task's number orders the files."""

    sources: Sources
    number: int
    dataset: int
    first: int
    last: int

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{**values, "sources": Sources.from_json(values["sources"])})


@dataclass(frozen=True, kw_only=True)
class PartitionTask:
    """One partition: of digests if there is no band, else of a band of the hashes."""

    sources: Sources
    files: int
    partition: int
    band: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{**values, "sources": Sources.from_json(values["sources"])})


def scatter_tasks(sources: Sources) -> list[ScatterTask]:
    """Runs of units with about ROWS_PER_TASK samples, in the order of ids."""
    tasks: list[ScatterTask] = []
    for dataset in range(len(sources.evaluations) + 1):
        counts = sources.open(dataset).counts
        step = (np.cumsum(counts) - counts) // ROWS_PER_TASK
        starts = [*np.flatnonzero(np.diff(step, prepend=-1)).tolist(), len(counts)]
        for first, last in pairwise(starts):
            number = len(tasks)
            tasks.append(ScatterTask(sources=sources, number=number, dataset=dataset, first=first, last=last))
    return tasks


def scatter(values: Mapping[str, Any]) -> tuple[int, int]:
    """Write the hashes of a ScatterTask's units; says how many samples have no phash, or a flat one."""
    task = ScatterTask.from_json(values)
    sources = task.sources
    opened = sources.open(task.dataset)
    digests, hashes, ids, hashed_ids = [], [], [], []
    unhashed = flat = 0
    indices = range(task.first, task.last)
    read = opened.kept_rows_of(indices, ["sha256", "phash", "duration_ms"])
    for index, rows in zip(indices, read, strict=True):
        keys = keys_of(int(opened.units[index]), rows["slot"].to_numpy())
        own = keys + np.uint64(task.dataset << DATASET_SHIFT)
        ids.append(own)
        digests.append(np.frombuffer(b"".join(rows["sha256"].to_pylist()), np.uint8).reshape(-1, 32))
        if sources.radius is not None:
            column = rows["phash"].combine_chunks()
            there = np.asarray(column.is_valid())
            phashes = column.fill_null(0).to_numpy(zero_copy_only=False)
            dull = there & duplicates.is_flat(phashes)
            if "duration_ms" in rows.column_names:
                # Clips are alike if they also are as long.
                phashes = phashes ^ duplicates.of_length(rows["duration_ms"].fill_null(0).to_numpy())
            hashes.append(phashes[there & ~dull])
            hashed_ids.append(own[there & ~dull])
            unhashed += int((~there).sum())
            flat += int(dull.sum())
    digest_file, hash_file = _files(sources, task.number)
    duplicates.scatter_digests(digest_file, np.concatenate(digests), np.concatenate(ids), sources.partitions)
    if sources.radius is not None:
        duplicates.scatter_hashes(
            hash_file,
            np.concatenate(hashes),
            np.concatenate(hashed_ids),
            radius=sources.radius,
            partitions=sources.partitions,
        )
    return unhashed, flat


def search(values: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Find the duplicates of a PartitionTask's partition, and leave them in files.

    Returns:
        Pairs compared, hot buckets, their members, pairs in them that were not compared.
    """
    task = PartitionTask.from_json(values)
    sources, partitions = task.sources, task.sources.partitions
    files = [_files(sources, number) for number in range(task.files)]
    if task.band is None or sources.radius is None:
        paths = [digest_file for digest_file, _ in files]
        records = read_partition(paths, task.partition, partitions, duplicates.DIGESTS)
        _save(task, "exact", duplicates.exact_duplicates(records, first_own=sources.first_own))
        return 0, 0, 0, 0
    paths = [hash_file for _, hash_file in files]
    place, places = task.band * partitions + task.partition, (sources.radius + 1) * partitions
    records = read_partition(paths, place, places, duplicates.HASHES)
    near = duplicates.near_duplicates(
        records, radius=sources.radius, band=task.band, first_own=sources.first_own
    )
    _save(task, "same", near.same)
    _save(task, "alike", near.alike)
    return near.pairs.compared, near.pairs.hot_buckets, near.pairs.hot_members, near.pairs.not_compared


def partition_tasks(sources: Sources, files: int) -> list[PartitionTask]:
    """Every partition of what so many scatter tasks wrote."""
    bands = [None, *range(0 if sources.radius is None else sources.radius + 1)]
    return [
        PartitionTask(sources=sources, files=files, partition=partition, band=band)
        for band in bands
        for partition in range(sources.partitions)
    ]


def collect(tasks: Sequence[PartitionTask]) -> NDArray[Any]:
    """What is dropped, `duplicates.DROPS`, from what all partitions' searches left."""
    exact = _load([task for task in tasks if task.band is None], "exact", duplicates.DROPS)
    near = [task for task in tasks if task.band is not None]
    same = _load(near, "same", duplicates.DROPS)
    alike = duplicates.first_come(_load(near, "alike", duplicates.ALIKE))
    return duplicates.settle(exact, same, alike)


def _files(sources: Sources, number: int) -> tuple[Path, Path]:
    """Where a task scatters its digests and its hashes."""
    return tuple(Path(sources.scratch) / f"{kind}-{number:06d}" for kind in ("digests", "hashes"))  # type: ignore[return-value]


def _found(task: PartitionTask, kind: str) -> Path:
    band = "" if task.band is None else f"-{task.band}"
    return Path(task.sources.scratch) / f"{kind}{band}-{task.partition:06d}.npy"


def _save(task: PartitionTask, kind: str, records: NDArray[Any]) -> None:
    with whole_file(_found(task, kind)) as file:
        np.save(file, records, allow_pickle=False)


def _load(tasks: Sequence[PartitionTask], kind: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    found = [np.load(_found(task, kind), allow_pickle=False) for task in tasks]
    return np.concatenate([np.empty(0, dtype), *found])
