"""Views: named subsets of a sealed dataset that never rewrite its shards.

`views/{name}.parquet` has one row per unit: unit, slots (samples in the shard), kept (how many of them the
view keeps), bitmap (one bit per slot, the first slot in the lowest bit of the first byte). The file's schema
names the root it was made for. Runs pin views by name, so a published view is never replaced.

`views/{name}.duplicates.parquet` stands beside a view that dedup made, for people: which sample was dropped
for which. `ingest.dataset.schema` has its columns.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.dataset.parquet import read_parquet
from ingest.dataset.schema import VIEW_SCHEMA
from ingest.store.open import open_store

DUPLICATES = ".duplicates"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class PackedKeeps(Mapping[int, NDArray[np.bool_]]):
    """For each unit, whether each slot stays: kept as bits, so that a billion samples take 125 MB."""

    def __init__(self) -> None:
        self._packed: dict[int, tuple[int, bytes]] = {}

    def add(self, unit: int, keeps: NDArray[np.bool_]) -> None:
        self._packed[unit] = len(keeps), np.packbits(keeps, bitorder="little").tobytes()

    def __getitem__(self, unit: int) -> NDArray[np.bool_]:
        slots, packed = self._packed[unit]
        return _unpack(packed, slots)

    def __iter__(self) -> Iterator[int]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


@dataclass(frozen=True, kw_only=True, eq=False)
class ViewBitmaps:
    """Which samples of each unit a view keeps. Bits stay packed: 125 MB for a billion samples.

    Attributes:
        name: the view's name.
        root: Merkle root of the dataset it was made for, hex.
        digest: sha256 of the view's file, hex: the view's identity.
        units: unit numbers, ascending, (u,) uint32.
        slots: samples in each unit's shard, (u,) int64.
        kept: samples of each unit that the view keeps, (u,) int64.
        packed: for each unit its bits, 8 slots to a byte.
    """

    name: str
    root: str
    digest: str
    units: NDArray[np.uint32]
    slots: NDArray[np.int64]
    kept: NDArray[np.int64]
    packed: tuple[bytes, ...]

    def keeps(self, unit: int) -> NDArray[np.bool_]:
        """Whether each slot of the unit is in the view, (slots,) bool.

        Raises:
            KeyError: the view has no row for this unit.
        """
        index = int(np.searchsorted(self.units, unit))
        if index == len(self.units) or self.units[index] != unit:
            raise KeyError(unit)
        return _unpack(self.packed[index], int(self.slots[index]))

    def within(self, other: "ViewBitmaps") -> "ViewBitmaps":
        """What both views of one root keep."""
        units, mine, theirs = np.intersect1d(self.units, other.units, return_indices=True)
        bits = [
            np.frombuffer(self.packed[m], np.uint8) & np.frombuffer(other.packed[t], np.uint8)
            for m, t in zip(mine.tolist(), theirs.tolist(), strict=True)
        ]
        return ViewBitmaps(
            name=f"{self.name} in {other.name}",
            root=self.root,
            digest=hashlib.sha256(f"{self.digest} {other.digest}".encode()).hexdigest(),
            units=units,
            slots=self.slots[mine],
            kept=np.array([np.bitwise_count(each).sum() for each in bits], np.int64),
            packed=tuple(each.tobytes() for each in bits),
        )

    def of_slots(self, unit: int, slots: int) -> NDArray[np.bool_]:
        """As `keeps`, for a unit of so many slots; a unit without a row has none in the view."""
        index = int(np.searchsorted(self.units, unit))
        there = index < len(self.units) and self.units[index] == unit
        return self.keeps(unit) if there else np.zeros(slots, np.bool_)


def view_name(name: str) -> str:
    """Where the view lies in its dataset; a UserError if the name could leave the folder."""
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name for a view: use letters, digits, dots, dashes and underscores")
    if name.endswith(DUPLICATES):
        raise UserError(f"{name!r} is no name for a view: {DUPLICATES} is for the list of its duplicates")
    return f"{layout.VIEWS}/{name}.parquet"


def duplicates_name(name: str) -> str:
    """Where the list of a view's duplicates lies in its dataset."""
    return view_name(name).removesuffix(".parquet") + f"{DUPLICATES}.parquet"


def view_names(dataset_path: str | Path) -> list[str]:
    """The dataset's views, whatever root they are of, sorted."""
    files = (PurePath(entry.name) for entry in open_store(dataset_path).list(layout.VIEWS))
    stems = (file.stem for file in files if file.suffix == ".parquet")
    return sorted(stem for stem in stems if NAME.fullmatch(stem) and not stem.endswith(DUPLICATES))


def read_view(dataset_path: str | Path, name: str, *, root: str | None) -> ViewBitmaps:
    """Open a view of the dataset sealed as `root`; None takes it whatever its root is.

    Raises:
        UserError: there is no such view, it is damaged, or it was made for another root.
    """
    store, file = open_store(dataset_path), view_name(name)
    path = store.where(file)
    try:
        data = store.read(file)
    except FileNotFoundError:
        there = view_names(dataset_path)
        known = f"it has {', '.join(there)}" if there else "it has no views"
        raise UserError(f"{dataset_path} has no view named {name}: {known}") from None
    try:
        table = read_parquet(io.BytesIO(data))
        made_for = (table.schema.metadata or {})[b"root"].decode()
        columns = {field.name: table.column(field.name) for field in VIEW_SCHEMA}
    except (pa.ArrowInvalid, OSError, KeyError, UnicodeDecodeError):
        raise UserError(f"{path} is not a readable view: make it again under another name") from None
    if root not in (None, made_for):
        raise UserError(
            f"view {name} was made for root {made_for[:12]} and this is root {str(root)[:12]}: "
            f"open the dataset with that root, or make the view again under another name"
        )
    view = ViewBitmaps(
        name=name,
        root=made_for,
        digest=hashlib.sha256(data).hexdigest(),
        units=columns["unit"].to_numpy().astype(np.uint32),
        slots=columns["slots"].to_numpy().astype(np.int64),
        kept=columns["kept"].to_numpy().astype(np.int64),
        packed=tuple(columns["bitmap"].to_pylist()),
    )
    for unit, slots, kept, packed in zip(view.units, view.slots, view.kept, view.packed, strict=True):
        if len(packed) != (slots + 7) // 8 or int(_unpack(packed, int(slots)).sum()) != kept:
            raise UserError(f"{path} is damaged at unit {unit}: make it again under another name")
    if np.any(np.diff(view.units.astype(np.int64)) <= 0):
        raise UserError(f"{path} is damaged (its units are not ascending): make it again under another name")
    return view


def refuse_taken_name(dataset_path: str | Path, name: str, *, root: str) -> None:
    """Before the work: a view of this name that was made for another root cannot be the one to be written.

    Raises:
        UserError: there is one, or the name is none.
    """
    if open_store(dataset_path).exists(view_name(name)):
        read_view(dataset_path, name, root=root)


def write_view(
    dataset_path: str | Path, name: str, *, root: str, keeps: Mapping[int, NDArray[np.bool_]]
) -> Path | str:
    """Publish a view at once and for good; writing the same view again changes nothing.

    Args:
        dataset_path: the dataset's folder or URL.
        name: the view's name.
        root: the sealed root that the slots belong to, hex.
        keeps: for each unit, whether each slot stays, (slots,) bool.

    Raises:
        UserError: another view of this name exists, or the name is not one.

    Returns:
        Where it lies.
    """
    store, file = open_store(dataset_path), view_name(name)
    path = store.where(file)
    rows: dict[str, list[Any]] = {field: [] for field in VIEW_SCHEMA.names}
    for unit in sorted(keeps):
        bits = keeps[unit]
        packed = np.packbits(bits, bitorder="little").tobytes()
        for column, value in zip(rows.values(), (unit, len(bits), int(bits.sum()), packed), strict=True):
            column.append(value)
    table = pa.table(rows, schema=VIEW_SCHEMA.with_metadata({"root": root}))
    data = _parquet_bytes(table)
    if store.create_if_absent(file, data) != data:
        raise UserError(f"{path} exists and runs may use it: write the view under another name")
    return path


def write_duplicates(dataset_path: str | Path, name: str, table: pa.Table) -> Path | str:
    """Publish the list of duplicates of a view that is published already; doing it again changes nothing.

    Raises:
        UserError: another list is there.
    """
    store, file = open_store(dataset_path), duplicates_name(name)
    path = store.where(file)
    data = _parquet_bytes(table)
    if store.create_if_absent(file, data) != data:
        raise UserError(f"{path} exists, with other duplicates: write the view under another name")
    return path


def _parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _unpack(packed: bytes, slots: int) -> NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=slots, bitorder="little")
    return bits.astype(np.bool_)
