"""Tags of a dataset's images, in a folder beside it: what a training learns in place of the dataset's labels.

FOLDER/tags.json                the vocabulary, what it was made of, and the sha256 of units.parquet
FOLDER/units.parquet            each unit that has tagged images: as in a view, how often an epoch has them,
                                and the sha256 of its file
FOLDER/units/{unit:08d}.parquet slot and tags of each image that has any, and how often an epoch has it; a
                                tag's code is its place in the vocabulary
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import UserError
from ingest.dataset.open import Dataset
from ingest.dataset.parquet import read_parquet
from ingest.dataset.records import Record, Sha256
from ingest.dataset.schema import VIEW_SCHEMA
from ingest.dataset.view import ViewBitmaps
from ingest.dataset.vocabulary import UnitLabels

FILE = "tags.json"
UNITS = "units.parquet"
UNITS_SCHEMA = VIEW_SCHEMA.append(pa.field("copies", pa.uint64(), nullable=False)).append(
    pa.field("sha256", pa.binary(32), nullable=False)
)
TAGS_SCHEMA = pa.schema(
    [
        pa.field("slot", pa.uint32(), nullable=False),
        pa.field("tags", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("copies", pa.uint32(), nullable=False),
    ]
)
_REMEDY = "make the tags anew in another folder"


class Tag(Record):
    """One tag.

    Attributes:
        index: its code.
        synset: of WordNet, such as n02132136.
        kind: WordNet's lexicographer file.
        nouns: that lead to it; the first is its name.
        count: images that have it.
    """

    index: int
    synset: str
    kind: str
    nouns: tuple[str, ...]
    count: int


class Vocabulary(Record):
    """tags.json.

    Attributes:
        root, view: of the dataset, and the sha256 of the view's file.
        made_by: the recipe.
        images: that were looked at.
        tagged: those that have a tag.
        units_sha256: of units.parquet.
        tags: the most frequent first.
    """

    root: Sha256
    view: Sha256 | None
    made_by: Mapping[str, Any]
    images: int
    tagged: int
    units_sha256: Sha256
    tags: tuple[Tag, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tags:
    """The tags of a dataset's images.

    Attributes:
        folder: where they are.
        sha256: of tags.json, hex, and by what it names of all of them.
        vocabulary: what tags.json says.
        copies: how often an epoch has each unit's images, together: (units,), in the order of `tagged`.
        digests: of each unit's file.
    """

    folder: Path
    sha256: str
    vocabulary: Vocabulary
    tagged: ViewBitmaps
    copies: NDArray[np.int64]
    digests: Mapping[int, bytes]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the tags, in the order of their codes; each is another."""
        return tuple(tag.nouns[0] for tag in self.vocabulary.tags)

    @property
    def resampled(self) -> bool:
        """Whether an epoch has some images several times."""
        return int(self.copies.sum()) > self.vocabulary.tagged

    def of_unit(self, unit: int) -> pa.Table:
        """A unit's images that have tags, in the order of their slots: TAGS_SCHEMA.

        Raises:
            UserError: they are damaged.
        """
        path = unit_path(self.folder, unit)
        return read_parquet(io.BytesIO(_checked(path, self.digests[unit])))

    def unit_labels(self, dataset: Dataset, unit_index: int) -> UnitLabels:
        """The tags of one unit's samples, all of which must have some, as `Dataset.unit_labels` gives labels.

        Raises:
            UserError: they are damaged.
        """
        table = self._shown(dataset, unit_index)
        codes = table["tags"].combine_chunks()
        starts = np.concatenate([[0], np.cumsum(codes.value_lengths().to_numpy(), dtype=np.int64)])
        nothing = np.empty(0, np.int32), np.zeros(len(starts), np.int64)
        return UnitLabels(
            codes=codes.flatten().to_numpy(), starts=starts, ignored=nothing[0], ignored_starts=nothing[1]
        )

    def unit_copies(self, dataset: Dataset, unit_index: int) -> NDArray[np.uint32]:
        """How often an epoch has each of one unit's samples, all of which must have tags.

        Raises:
            UserError: they are damaged.
        """
        copies: NDArray[np.uint32] = self._shown(dataset, unit_index)["copies"].to_numpy()
        return copies

    def _shown(self, dataset: Dataset, unit_index: int) -> pa.Table:
        unit = int(dataset.units[unit_index])
        table = self.of_unit(unit)
        if dataset.view is not None:
            table = table.filter(dataset.view.keeps(unit)[table["slot"].to_numpy()])
        return table


def open_tags(folder: Path) -> Tags:
    """The tags in a folder.

    Raises:
        UserError: there are none, or they are damaged.
    """
    path = folder / FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{folder} has no tags: make some with `submit hashtags DATASET {folder}`") from None
    vocabulary = Vocabulary.read(data, where=path, remedy=_REMEDY)
    listing = _checked(folder / UNITS, bytes.fromhex(vocabulary.units_sha256))
    table = read_parquet(io.BytesIO(listing), schema=UNITS_SCHEMA)
    units = table["unit"].to_numpy()
    sha256 = hashlib.sha256(data).hexdigest()
    return Tags(
        folder=folder,
        sha256=sha256,
        vocabulary=vocabulary,
        tagged=ViewBitmaps(
            name=str(folder),
            root=vocabulary.root,
            digest=sha256,
            units=units,
            slots=table["slots"].to_numpy().astype(np.int64),
            kept=table["kept"].to_numpy().astype(np.int64),
            packed=tuple(table["bitmap"].to_pylist()),
        ),
        copies=table["copies"].to_numpy().astype(np.int64),
        digests=dict(zip(units.tolist(), table["sha256"].to_pylist(), strict=True)),
    )


def unit_path(folder: Path, unit: int) -> Path:
    """Where a unit's tags are."""
    return folder / "units" / f"{unit:08d}.parquet"


def _checked(path: Path, sha256: bytes) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {_REMEDY}") from None
    if hashlib.sha256(data).digest() != sha256:
        raise UserError(f"{path} is not the file that was made with the tags beside it: {_REMEDY}")
    return data
