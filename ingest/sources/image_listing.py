"""The images of a source as rows to plan, and a digest of them that tells whether it is still the same."""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa

from ingest.dataset.plan_record import SourceRecord
from ingest.dataset.records import canonical_json
from ingest.dataset.schema import ITEMS_SCHEMA
from ingest.sources.source import Found, Item, Source, first_folder

_BATCH = 1_024
# A stranger's item may have a name of 1 MB, and 128 KB of a companion's text.
_BATCH_CHARACTERS = 8 << 20


class ImageListing:
    """A `Listing` of a source of images."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.kind = source.kind
        self.extra = source.extra
        self._source = source
        self._description: SourceRecord | None = None

    def rows(self) -> Iterator[pa.Table]:
        for batch in _batches(self._items()):
            yield _table(batch, self.extra)

    def describe(self, listed: Callable[[int], None], found: Found | None = None) -> SourceRecord:
        if found is not None:
            return self._source.describe().model_copy(update=found._asdict())
        if self._description is None:
            for batch in _batches(self._items()):
                listed(len(batch))
        assert self._description is not None
        return self._description

    def close(self) -> None:
        self._source.close()

    def _items(self) -> Iterator[Item]:
        digest = hashlib.sha256()
        count = 0
        for item in self._source.items():
            digest.update(
                struct.pack("<IQQI", len(item.path), item.offset, item.size, len(item.problem))
                + item.path
                + item.problem.encode()
            )
            if item.caption is not None or item.extra or item.labels != first_folder(item.path):
                # What a companion says, which is no part of the item's own bytes.
                digest.update(
                    canonical_json([item.caption, item.labels, {k: str(v) for k, v in item.extra.items()}])
                )
            count += 1
            yield item
        found = {"items": count, "sha256": digest.hexdigest()}
        self._description = self._source.describe().model_copy(update=found)


def _table(batch: Sequence[Item], extra: pa.Schema) -> pa.Table:
    own = [field for field in ITEMS_SCHEMA if field.name != "source"]
    columns = {field.name: [getattr(item, field.name) for item in batch] for field in own}
    further = {name: [item.extra.get(name) for item in batch] for name in extra.names}
    return pa.table(columns | further, schema=pa.schema([*own, *extra]))


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """The items in lists that end after _BATCH items, or earlier, when their texts are very long."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        texts = (item.path, item.caption or "", *item.labels, *map(str, item.extra.values()))
        size += sum(map(len, texts))
        if len(batch) == _BATCH or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
