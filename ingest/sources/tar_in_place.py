"""Tars that others made, used where they lie: as a source, and as the shard of units.

What is in the tar is what is trained on: no image is re-encoded, turned upright, or stripped of its metadata.
Whoever publishes such a dataset publishes what cameras wrote into the files, places included.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from cluster.errors import UserError
from ingest.dataset.shard import MetaWriter
from ingest.image.check import Checked
from ingest.sources.companions import COLUMNS
from ingest.sources.source import Item, Problem
from ingest.sources.tar import TarSource, open_file
from ingest.store.store import Store

KIND = "tar_in_place"


class ForeignTar:
    """A tar whose images stay in it.

    Args:
        place: its absolute path, or `s3://bucket/key`.
        name: what the dataset calls it: its place, or its path relative to a dataset that it lies in.
    """

    extra = COLUMNS

    def __init__(self, place: str, name: str) -> None:
        self.name = name
        self._place = place if "://" in place else Path(place)
        self._tar = TarSource(self._place)
        self._shard: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        return self._tar.describe() | {"kind": KIND, "name": self.name}

    def items(self) -> Iterator[Item]:
        return self._tar.items()

    def read(self, items: Iterable[Item], *, max_bytes: int) -> Iterator[bytes | Problem]:
        return self._tar.read(items, max_bytes=max_bytes)

    def close(self) -> None:
        self._tar.close()

    def shard(self) -> dict[str, Any]:
        """Name, bytes and sha256 of the whole tar, for commit records; it is read once.

        Raises:
            UserError: it cannot be read.
        """
        if self._shard is None:
            try:
                with open_file(self._place) as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                    self._shard = {"name": self.name, "bytes": file.seek(0, os.SEEK_END), "sha256": digest}
            except OSError as error:
                raise UserError(
                    f"{self._place} cannot be read ({error.strerror}): mend that, then run the same command "
                    "again"
                ) from error
        return self._shard


class InPlaceWriter:
    """Collects the rows of one unit whose images are in a foreign tar. Takes the place of a `ShardWriter`.

    Args:
        store: the dataset's files.
        unit: its number.
        shard: the tar's name, bytes and sha256.
        extra: columns that its rows have besides everyone's.
    """

    def __init__(self, store: Store, unit: int, *, shard: dict[str, Any], extra: pa.Schema) -> None:
        self._shard = shard
        self._meta = MetaWriter(store, unit, extra=extra)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """There is nothing to undo before `publish`."""

    def add(self, verdict: Checked, data: bytes, *, offset: int, **row: Any) -> None:
        """Append one attempt.

        Args:
            verdict: the check's result.
            data: the image as it is in the tar.
            offset: where in the tar.
            row: what `MetaWriter.add` wants to know besides.
        """
        if verdict.status == "kept":
            # A check's sha256 is that of what a crawl would store.
            verdict = replace(verdict, sha256=hashlib.sha256(data).hexdigest())
        self._meta.add(verdict, offset=offset, size=len(data), **row)

    def publish(self, *, generation: int, fingerprint: str) -> dict[str, Any]:
        """Make the Parquet durable; returns the record to commit."""
        return self._meta.publish(generation=generation, fingerprint=fingerprint, shard=self._shard)
