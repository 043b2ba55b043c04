"""Samples as the webdataset library has them: see `ingest.dataset.webdataset`.

Images are read at the places that the rows name, many neighbours at once, and not by reading tars: a view
skips what it does not have, and tars that others made and filled with more are read alike.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.dataset.keys import key_name, keys_of
from ingest.dataset.open import Dataset, open_dataset
from ingest.dataset.vocabulary import encoded

_OWN = ("offset", "size", "sha256", "format", "labels")
# Neighbours are read at once, with what lies between them, unless that is more than a request is worth.
_LARGEST_READ = 4 << 20
_LARGEST_GAP = 1 << 20


def make_pipeline(
    path: str | Path, view: str | None, columns: Sequence[str], *, shardshuffle: int, seed: int | None
) -> Any:
    """See `ingest.dataset.webdataset`."""
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: python -m pip install webdataset") from error

    if isinstance(columns, str):
        raise UserError(f"columns is a list of names: give [{columns!r}]")
    dataset = open_dataset(path, view=view)
    if not len(dataset.units):
        raise UserError(
            f"{path} has no image{f' in the view {view}' if view else ''}: see `ingest stats {path}`"
        )
    there = {
        name for index in dataset.unit_of_each_generation() for name in dataset.kept_rows(index).column_names
    }
    if missing := [name for name in columns if name not in there]:
        raise UserError(f"{path} has no column {missing[0]}: it has {', '.join(sorted(there))}")
    pipeline = webdataset.FluidWrapper(_Units(len(dataset.units)))
    pipeline.append(webdataset.split_by_node)
    pipeline.append(webdataset.split_by_worker)
    if shardshuffle:
        # The library's own shuffle repeats one order when it has a seed.
        shuffle = webdataset.shuffle if seed is None else webdataset.detshuffle
        # True is a hundred to that library, too.
        buffer = 100 if shardshuffle is True else shardshuffle
        pipeline.append(shuffle(buffer, **({} if seed is None else {"seed": seed})))
    pipeline.append(_Samples(str(path), dataset.root, view, tuple(columns)))
    return pipeline


class _Units:
    """All units, by their places in the dataset."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(self) -> Iterator[int]:
        return iter(range(self._count))


class _Samples:
    """The samples of units, in whichever process it is called: connections and files do not travel."""

    def __init__(self, path: str, root: str, view: str | None, columns: tuple[str, ...]) -> None:
        self._path, self._root, self._view, self._columns = path, root, view, columns
        self._opened: tuple[int, Dataset] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def __call__(self, units: Iterable[int]) -> Iterator[dict[str, Any]]:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_dataset(self._path, sealed=self._root, view=self._view)
        dataset = self._opened[1]
        for unit_index in units:
            rows = dataset.kept_rows(unit_index, [*_OWN, *self._columns])
            keys = keys_of(int(dataset.units[unit_index]), rows["slot"].to_numpy()).tolist()
            shard = dataset.shard_path(unit_index)
            kinds = (layout.EXTENSIONS[name] for name in rows["format"].to_pylist())
            images, columns = _images(dataset, unit_index, rows), self._columns_of(dataset, rows)
            for key, kind, image, more in zip(keys, kinds, images, columns, strict=True):
                yield {"__key__": key_name(key), "__url__": shard, kind: image, **more}

    def _columns_of(self, dataset: Dataset, rows: pa.Table) -> Iterator[dict[str, bytes]]:
        there = [name for name in self._columns if name in rows.column_names]
        labels = encoded(rows, dataset.vocabulary) if "labels" in there else None
        for number, row in enumerate(rows.select(there).to_pylist()):
            # A generation that lacks a column has nothing there.
            values = {name: row.get(name) for name in self._columns}
            sample = {"json": json.dumps(values, ensure_ascii=False, default=_plain).encode()}
            if values.get("caption"):
                sample["txt"] = values["caption"].encode()
            if labels is not None and len(codes := labels.of(number)) == 1:
                sample["cls"] = str(codes[0]).encode()
            yield sample


def _images(dataset: Dataset, unit_index: int, rows: pa.Table) -> Iterator[bytes]:
    """The images of some rows in their order, each checked."""
    places = list(zip(rows["offset"].to_pylist(), rows["size"].to_pylist(), strict=True))
    digests = rows["sha256"].to_pylist()
    for first, last in _neighbours(places):
        start, stop = places[first][0], sum(places[last - 1])
        try:
            data = dataset.read_shard(unit_index, start, stop - start)
        except FileNotFoundError:
            raise _damaged(dataset, unit_index, "missing") from None
        for number in range(first, last):
            offset, size = places[number]
            image = data[offset - start : offset - start + size]
            if hashlib.sha256(image).digest() != digests[number]:
                image = dataset.read_shard(unit_index, offset, size)  # a torn page may have been served
                if hashlib.sha256(image).digest() != digests[number]:
                    raise _damaged(dataset, unit_index, f"damaged at byte {offset}")
            yield image


def _damaged(dataset: Dataset, unit_index: int, how: str) -> UserError:
    return UserError(
        f"{dataset.shard_path(unit_index)} is {how}: restore it; `ingest verify {dataset.path} --level sha` "
        "names all such"
    )


def _neighbours(places: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the images that are read at once."""
    first = 0
    for number in range(1, len(places) + 1):
        if (
            number == len(places)
            or not 0 <= places[number][0] - sum(places[number - 1]) <= _LARGEST_GAP
            or sum(places[number]) - places[first][0] > _LARGEST_READ
        ):
            yield first, number
            first = number


def _plain(value: Any) -> str:
    """What JSON has no word for: times as ISO has them, digests in hex."""
    return value.hex() if isinstance(value, bytes) else str(value)
