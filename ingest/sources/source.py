"""What a source of images is: a list of items to plan, and their bytes when a unit is worked on."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

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


def first_folder(path: bytes) -> tuple[str, ...]:
    """The label of what lies in a folder: the folder's name, the first below the source."""
    folder, slash, _ = path.partition(b"/")
    return (folder.decode("utf-8", "backslashreplace"),) if slash else ()


class Source(Protocol):
    """Images in their place of origin.

    `name` begins every path that is reported. `items` yields the same items in the same order as long as
    nothing in the source changes. `read` gives each item's bytes, or its problem, in the order asked. Items
    have no further columns than `extra` has.
    """

    name: str
    extra: pa.Schema

    def items(self) -> Iterator[Item]: ...

    def close(self) -> None: ...

    def read(self, items: Iterable[Item], *, max_bytes: int) -> Iterator[bytes | Problem]: ...

    def describe(self) -> dict[str, Any]: ...
