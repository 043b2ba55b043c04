"""Tars that others made, used where they lie: as a source, and as the shard of units.

What is in the tar is what is trained on: no image is re-encoded, turned upright, or stripped of its metadata.
Whoever publishes such a dataset publishes what cameras wrote into the files, places included.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from ingest.problem import Problem
from ingest.sources.companions import COLUMNS
from ingest.sources.source import Item
from ingest.sources.tar import TarSource, open_file

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
