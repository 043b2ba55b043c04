"""Opening a sealed dataset: the only way the pipeline sees data. What is not sealed is never looked at."""

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.dataset.keys import keys_of
from ingest.dataset.records import Pointer, SealedHead
from ingest.dataset.view import ViewBitmaps, read_view
from ingest.dataset.vocabulary import (
    LABEL_COLUMNS,
    UnitLabels,
    Vocabulary,
    encoded,
    make_vocabulary,
    read_vocabulary,
)
from ingest.store.open import home_of, open_store
from ingest.store.store import Store

# What a reader needs of a sample: where its bytes lie in the unit's tar, its slot, and their sha256.
ROW = np.dtype([("offset", "<u8"), ("size", "<u8"), ("slot", "<u4"), ("sha256", "V32")])
# Of 4,096 units each: a billion samples of units of 16,384 have 15. A reader of shuffled windows uses all.
_BLOCKS_KEPT = 64
# Metadata of units, of some MB each, in memory at a time.
_FILES_AT_ONCE = 16
_COLUMNS = {"shard": ["shard"], "meta": ["meta", "meta_sha256"]}

T = TypeVar("T")


class UnitFiles:
    """Names of units' files, read from the sealed list when asked for: there can be a million of them.

    The list comes in blocks, of which the last used are kept.

    Args:
        store: the dataset's files.
        listing: name of the sealed list of units.
        rows: the units' places in the list, ascending.
    """

    def __init__(self, store: Store, listing: str, rows: NDArray[np.int64]) -> None:
        self._store = store
        self._listing = listing
        self._rows = rows
        self._starts: NDArray[np.int64] | None = None  # the first row of each block, and the end
        self._blocks: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    def name(self, unit_index: int, kind: Literal["shard", "meta"]) -> str:
        """Of a unit's tar or Parquet file, in the dataset; see `store.home_of` for tars elsewhere."""
        name: str = self._row(unit_index, kind)[kind].as_py()
        return name

    def meta_sha256(self, unit_index: int) -> bytes:
        """Of a unit's Parquet file: what its rows are known by, in whichever dataset."""
        digest: bytes = self._row(unit_index, "meta")["meta_sha256"].as_py()
        return digest

    def of(self, units: NDArray[np.int64]) -> "UnitFiles":
        """Those of some units only, by their places, ascending."""
        return UnitFiles(self._store, self._listing, self._rows[units])

    def _row(self, unit_index: int, kind: str) -> dict[str, pa.Scalar]:
        row = int(self._rows[unit_index])
        if self._starts is None:
            with self._store.open(self._listing) as file:
                metadata = pq.read_metadata(file)
            sizes = [metadata.row_group(block).num_rows for block in range(metadata.num_row_groups)]
            self._starts = np.cumsum([0, *sizes])
        block = int(np.searchsorted(self._starts, row, side="right")) - 1
        # Each line is one act: another thread may read or drop the same block.
        table = self._blocks.pop((kind, block), None)
        if table is None:
            with open_parquet(self._store, self._listing) as parquet:
                table = parquet.read_row_group(block, columns=_COLUMNS[kind], use_threads=False)
        self._blocks[kind, block] = table
        while len(self._blocks) > _BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return {column: table[column][row - int(self._starts[block])] for column in _COLUMNS[kind]}


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A sealed dataset, or a view of it. Units without a sample are left out.

    Attributes:
        path: the dataset's folder or URL.
        store: its files.
        root: Merkle root, hex: the dataset's identity.
        view: the view's bitmaps; None for the whole dataset.
        units: unit numbers, ascending, (u,) uint32.
        counts: samples per unit, (u,) int64.
        files: names of each unit's files below `path`.
    """

    path: str
    store: Store
    root: str
    view: ViewBitmaps | None
    units: NDArray[np.uint32]
    counts: NDArray[np.int64]
    files: UnitFiles

    def __len__(self) -> int:
        return int(self.counts.sum())

    def through(self, view: ViewBitmaps) -> "Dataset":
        """The samples that are in a view of this root, which must lie within the view that there is."""
        kept = dict(zip(view.units.tolist(), view.kept.tolist(), strict=True))
        counts = np.array([kept.get(unit, 0) for unit in self.units.tolist()], np.int64)
        used = np.flatnonzero(counts)
        return replace(
            self, view=view, units=self.units[used], counts=counts[used], files=self.files.of(used)
        )

    def shard_path(self, unit_index: int) -> str:
        """Path or URL of the tar that a unit's images are in; several units may have one tar."""
        name = self.files.name(unit_index, "shard")
        home, below = home_of(self.store, name)
        return f"{self.path}/{name}" if home is self.store else str(home.where(below))

    def meta_path(self, unit_index: int) -> str:
        return f"{self.path}/{self.files.name(unit_index, 'meta')}"

    def shard_is_local(self, unit_index: int) -> bool:
        """Whether a unit's tar can be opened by its path."""
        home, _ = home_of(self.store, self.files.name(unit_index, "shard"))
        return isinstance(home.root, Path)

    def read_shard(self, unit_index: int, offset: int, size: int) -> bytes:
        """Bytes of a unit's tar; fewer where it ends."""
        home, name = home_of(self.store, self.files.name(unit_index, "shard"))
        return home.read_range(name, offset, size)

    def unit_of_each_generation(self) -> list[int]:
        """Places of units, one of each generation that has samples: its units have the same columns."""
        sealed = sealed_units(self.path, self.root, columns=["unit", "generation"])
        generation = sealed["generation"].to_numpy()[np.isin(sealed["unit"].to_numpy(), self.units)]
        places: list[int] = np.unique(generation, return_index=True)[1].tolist()
        return places

    def unit_rows(self, unit_index: int) -> NDArray[np.void]:
        """One unit's samples in slot order, those in the view: (n,) `ROW`.

        Raises:
            UserError: its metadata is not what was sealed.
        """
        table = self._checked(unit_index, ["offset", "size", "sha256"]).combine_chunks()
        rows = np.empty(len(table), ROW)
        for column in ("offset", "size", "slot"):
            rows[column] = table[column].to_numpy()
        if len(table):
            # Arrow's own buffer: Python's objects would take ten times as long.
            digests = table["sha256"].chunk(0)
            rows["sha256"] = np.frombuffer(digests.buffers()[1], "V32", len(table), 32 * digests.offset)
        return rows

    def unit_keys(self, unit_index: int) -> NDArray[np.uint64]:
        """The keys of one unit's samples, see `ingest.dataset.keys`, (n,)."""
        return keys_of(int(self.units[unit_index]), self.kept_rows(unit_index, [])["slot"].to_numpy())

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The labels of all attempts of the root, in whichever view: their codes are the same in all of them.

        Raises:
            UserError: it is damaged.
        """
        there = read_vocabulary(self.store, self.root)
        return make_vocabulary(self.store, self.root, self._all_labels()) if there is None else there

    def unit_labels(self, unit_index: int) -> UnitLabels:
        """All labels of one unit's samples, and those to ignore, as codes of the vocabulary.

        Raises:
            UserError: the vocabulary is damaged.
        """
        return encoded(self._checked(unit_index, LABEL_COLUMNS), self.vocabulary)

    def _all_labels(self) -> Iterator[pa.Table]:
        def labels(_: int, parquet: pq.ParquetFile) -> pa.Table:
            there = [column for column in LABEL_COLUMNS if column in parquet.schema_arrow.names]
            return parquet.read(columns=there, use_threads=False)

        metas = sealed_units(self.path, self.root, columns=["meta"])["meta"].to_pylist()
        return read_each(self.store, metas, labels)

    def kept_rows_of(
        self, unit_indices: Sequence[int], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """As `kept_rows`, of many units; see `read_each`."""
        names = [self.files.name(index, "meta") for index in unit_indices]
        return read_each(
            self.store, names, lambda place, parquet: self._kept(unit_indices[place], parquet, columns)
        )

    def kept_rows(self, unit_index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One unit's samples in slot order: `slot`, and those of the columns that it has; None for all."""
        with open_parquet(self.store, self.files.name(unit_index, "meta")) as parquet:
            return self._kept(unit_index, parquet, columns)

    def _checked(self, unit_index: int, columns: Sequence[str]) -> pa.Table:
        """As `kept_rows`, of the whole file in one request: a store's delays cost more than its bytes."""
        name, sealed = self.files.name(unit_index, "meta"), self.files.meta_sha256(unit_index)
        data = self.store.read(name)
        if hashlib.sha256(data).digest() != sealed:
            data = self.store.read(name)  # a network file system may have served a torn page
        if hashlib.sha256(data).digest() != sealed:
            raise _damaged(self.store, name)
        with pq.ParquetFile(pa.BufferReader(data)) as parquet:
            return self._kept(unit_index, parquet, columns)

    def _kept(self, unit_index: int, parquet: pq.ParquetFile, columns: Sequence[str] | None) -> pa.Table:
        read = None if columns is None else list(dict.fromkeys(["slot", "status", *columns]))
        # One thread: loader workers are forked, and threads do not survive that.
        table = parquet.read(columns=read, use_threads=False)
        table = table.filter(pc.equal(table["status"], "kept"))
        if self.view is not None:
            table = table.filter(self.view.keeps(int(self.units[unit_index]))[table["slot"].to_numpy()])
        return table


def open_dataset(path: str | Path, *, sealed: str | None = None, view: str | None = None) -> Dataset:
    """Open a sealed dataset.

    Args:
        path: its folder, or a URL; `ingest.store.open` says which.
        sealed: a root to pin, hex; None opens the latest.
        view: name of a view to see it through.

    Raises:
        UserError: it is no dataset, is not sealed, has no such root or view, or is damaged.
    """
    store = open_store(path)
    root = latest_root(store) if sealed is None else sealed
    table = sealed_units(path, root, columns=["unit", "kept"])
    units = table["unit"].to_numpy().astype(np.uint32)
    counts = table["kept"].to_numpy().astype(np.int64)
    used = np.flatnonzero(counts)
    whole = Dataset(
        path=str(path),
        store=store,
        root=root,
        view=None,
        units=units[used],
        counts=counts[used],
        files=UnitFiles(store, layout.sealed_name(root, "parquet"), used),
    )
    return whole if view is None else whole.through(read_view(path, view, root=root))


def has_root(path: str | Path, root: str) -> bool:
    """Whether a dataset was sealed as this root, and has it still."""
    return open_store(path).exists(layout.sealed_name(root, "json"))


def sealed_head(path: str | Path, root: str) -> SealedHead:
    """What was sealed as this root: counts by status and reason, bytes, units.

    Raises:
        UserError: there is no such root, or what is there is damaged.
    """
    store, name = open_store(path), layout.sealed_name(root, "json")
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise UserError(
            f"{path} has no sealed root {root[:12]}: see {store.where('sealed')} for those it has; running "
            "the crawl again makes the newest anew"
        ) from None
    remedy = "remove it and run the crawl again, which makes it from the commits"
    return SealedHead.read(data, where=store.where(name), remedy=remedy)


def sealed_units(path: str | Path, root: str, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Every unit sealed as this root, empty ones too, ascending; columns of `schema.UNITS_SCHEMA`.

    Raises:
        UserError: there is no such root, or its list of units is damaged.
    """
    head = sealed_head(path, root)
    store, listing = open_store(path), layout.sealed_name(root, "parquet")
    damaged = (
        f"{path}: the list of units of root {root[:12]} is damaged; remove {store.where(listing)} "
        "and run the crawl again, which makes it from the commits"
    )
    try:
        file = store.open(listing)
    except FileNotFoundError:
        raise UserError(damaged) from None
    with file:
        if hashlib.file_digest(file, "sha256").hexdigest() != head.units_sha256:
            raise UserError(damaged)
        file.seek(0)  # what is parsed is what was checked, whatever happens to the name
        with pq.ParquetFile(file) as parquet:
            return parquet.read(columns=columns, use_threads=False)


@contextlib.contextmanager
def open_parquet(store: Store, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file that is none, or is missing, becomes a sentence; an unreadable one stays an OSError."""
    try:
        file = store.open(name)
    except FileNotFoundError:
        raise _damaged(store, name, "missing") from None
    with file, _as_parquet(store, name, file) as parquet:
        yield parquet


def read_each(store: Store, names: Sequence[str], read: Callable[[int, pq.ParquetFile], T]) -> Iterator[T]:
    """What `read` makes of each of many Parquet files, which is given its place among them, too; in order.

    In an object store they are read whole and many at once: its delays cost more than the bytes.

    Raises:
        UserError: one is damaged or missing.
    """
    if isinstance(store.root, Path):
        for place, name in enumerate(names):
            with open_parquet(store, name) as parquet:
                found = read(place, parquet)
            yield found
        return
    whole = store.read_many(names, at_once=_FILES_AT_ONCE)
    for place, (name, data) in enumerate(zip(names, whole, strict=True)):
        if data is None:
            raise _damaged(store, name, "missing")
        with _as_parquet(store, name, pa.BufferReader(data)) as parquet:
            found = read(place, parquet)
        yield found


@contextlib.contextmanager
def _as_parquet(store: Store, name: str, file: Any) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(file) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise _damaged(store, name) from error


def _damaged(store: Store, name: str, how: str = "damaged") -> UserError:
    return UserError(f"{store.where(name)} is {how}, restore it from a copy; `ingest verify` names all such")


def is_damage(error: Exception) -> bool:
    """Whether Arrow found no Parquet, or not all of it; a damaged header of a page it tells as an OSError."""
    if isinstance(error, OSError):
        return "thrift" in str(error)
    return isinstance(error, pa.ArrowException) and not isinstance(error, MemoryError)


def latest_root(store: Store) -> str:
    """The Merkle root, hex, that was sealed last.

    Raises:
        UserError: it is no dataset, or is not sealed.
    """
    path = store.root
    try:
        data = store.read(layout.DATASET)
    except FileNotFoundError:
        if store.exists(layout.plan_name(0)):
            raise UserError(
                f"{path} is not sealed yet: run the same `ingest crawl-shards` command again to finish it"
            ) from None
        raise UserError(
            f"{path} is not a dataset: make one with `ingest crawl-shards SOURCE --output {path}`"
        ) from None
    where = store.where(layout.DATASET)
    return Pointer.read(data, where=where, remedy="run the crawl again, which writes it anew").sealed
