"""Tars that others made, used where they lie: as a source, and as the shard of units.

What is in the tar is what is trained on: no image is re-encoded, turned upright, or stripped of its metadata.
Whoever publishes such a dataset publishes what cameras wrote into the files, places included.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster.errors import UserError
from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.dataset.records import FileRecord
from ingest.problem import Problem
from ingest.sources.companions import COLUMNS
from ingest.sources.source import Item
from ingest.sources.tar import TarSource
from ingest.store.files import open_file


class ForeignTar:
    """A tar whose images stay in it.

    Args:
        place: its absolute path, or its URL in a bucket.
        name: what the dataset calls it: its place, or its path relative to a dataset that it lies in.
    """

    kind = SourceKind.TAR_IN_PLACE
    extra = COLUMNS

    def __init__(self, place: str, name: str) -> None:
        self.name = name
        self._place = place if "://" in place else Path(place)
        self._tar = TarSource(self._place)
        self._shard: FileRecord | None = None

    def describe(self) -> SourceRecord:
        return self._tar.describe().model_copy(update={"kind": self.kind, "name": self.name})

    def items(self) -> Iterator[Item]:
        return self._tar.items()

    def read(self, items: Iterable[Item], *, max_bytes: int) -> Iterator[bytes | Problem]:
        return self._tar.read(items, max_bytes=max_bytes)

    def close(self) -> None:
        self._tar.close()

    def shard(self) -> FileRecord:
        """The whole tar; it is read once.

        Raises:
            UserError: it cannot be read.
        """
        if self._shard is None:
            try:
                with open_file(self._place) as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                    size = file.seek(0, os.SEEK_END)
                    self._shard = FileRecord(name=self.name, bytes=size, sha256=digest)
            except OSError as error:
                raise UserError(
                    f"{self._place} cannot be read ({error.strerror}): mend that, then run the same command "
                    "again"
                ) from error
        return self._shard
