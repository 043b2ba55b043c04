"""What a source of images is: a list of items to plan, and their bytes when a unit is worked on."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.dataset.records import FileRecord
from ingest.problem import Problem


@dataclass(frozen=True, slots=True)
class Item:
    """One planned attempt.

    Attributes:
        path: where it lies within the source, as the raw bytes of its name.
        offset: of its data, for sources that are one long file.
        size: in bytes, as the source claims it.
        problem: why it can have no bytes, known while planning: a key of PROBLEMS, or "".
        caption: a text that belongs to it.
        labels: what it is said to show.
        extra: further columns of its row.
    """

    path: bytes
    offset: int = 0
    size: int = 0
    problem: str = ""
    caption: str | None = None
    labels: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


class Found(NamedTuple):
    """What listing a source found, as `SourceRecord` has it."""

    items: int | None
    sha256: str


def first_folder(path: bytes) -> tuple[str, ...]:
    """The label of what lies in a folder: the folder's name, the first below the source."""
    folder, slash, _ = path.partition(b"/")
    return (folder.decode("utf-8", "backslashreplace"),) if slash else ()


class Images(Protocol):
    """Images in their place of origin, to be read.

    Attributes:
        name: begins every path that is reported.
    """

    name: str

    def read(self, items: Iterable[Item], *, max_bytes: int) -> Iterator[bytes | Problem]:
        """Each item's bytes, or its problem, in the order asked."""

    def shard(self) -> FileRecord | None:
        """The tar that its images are used in, where it lies; None if they are to be copied.

        Raises:
            UserError: it cannot be read.
        """

    def close(self) -> None: ...


class Source(Images, Protocol):
    """Images in their place of origin, to be listed and read.

    Attributes:
        kind: what it is.
        extra: columns that its items have besides everyone's.
    """

    kind: SourceKind

    @property
    def extra(self) -> pa.Schema: ...

    def items(self) -> Iterator[Item]:
        """The same items in the same order as long as nothing in the source changes."""

    def describe(self) -> SourceRecord:
        """What it is, without its items."""


class Listing(Protocol):
    """A source as it is planned: as rows.

    Attributes:
        name, kind, extra: see `Source`.
    """

    name: str
    kind: SourceKind

    @property
    def extra(self) -> pa.Schema: ...

    def rows(self) -> Iterator[pa.Table]:
        """Its attempts in order: columns of ITEMS_SCHEMA but `source`, and those of `extra`."""

    def describe(self, listed: Callable[[int], None], found: Found | None = None) -> SourceRecord:
        """What it is; `listed` is told how many more items were listed to know it.

        Rows that were listed to their end are not listed again, nor is a source if it is said what was found.
        """

    def close(self) -> None: ...
