"""Values that names of folders tell, as Hive and Spark write what all rows of a file share:
`lang=en/part-0.parquet`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from ingest.dataset.plan_record import SourceRecord
from ingest.dataset.schema import LABELS
from ingest.sources.source import Found, Listing
from ingest.sources.table_layout import own_name
from ingest.sources.url_list import CAPTION_NAMES, LABEL_NAMES

_NULL = "__HIVE_DEFAULT_PARTITION__"


def folder_values(location: str, file: str) -> dict[str, str | None]:
    """What the folders of a file say, below the one that a user named; a pattern with * names none."""
    if "*" in location:
        return {}
    folders = PurePosixPath(file.removeprefix(location)).parts[:-1]
    pairs = (part.split("=", 1) for part in folders if part.find("=") > 0)
    return {unquote(key): None if value == _NULL else unquote(value) for key, value in pairs}


class InValuedFolder:
    """A `Listing` whose rows have these values, in columns of text, in place of what it says of them itself.

    What is called like labels or captions is those.
    """

    def __init__(self, listing: Listing, values: Mapping[str, str | None]) -> None:
        self.name = listing.name
        self.kind = listing.kind
        self._listing = listing
        self._values = values

    @property
    def extra(self) -> pa.Schema:
        own = [name for name in map(_column, self._values) if name not in ("labels", "caption")]
        theirs = [each for each in self._listing.extra if each.name not in own]
        return pa.schema([*theirs, *(pa.field(name, pa.string()) for name in own)])

    def rows(self) -> Iterator[pa.Table]:
        for table in self._listing.rows():
            rows = table
            for name, value in self._values.items():
                column = _column(name)
                is_labels = column == "labels"
                told: Any = value if not is_labels else [] if value is None else [value]
                cells = pa.array([told] * len(rows), LABELS if is_labels else pa.string())
                if column in rows.column_names:
                    rows = rows.drop_columns(column)
                rows = rows.append_column(column, cells)
            yield rows

    def describe(self, listed: Callable[[int], None], found: Found | None = None) -> SourceRecord:
        record = self._listing.describe(listed, found)
        values = {f"value of {name}": value for name, value in self._values.items()}
        return record.model_copy(update={"columns": (record.columns or {}) | values})

    def close(self) -> None:
        self._listing.close()


def _column(name: str) -> str:
    """What rows call it."""
    if name.lower() in LABEL_NAMES:
        return "labels"
    if name.lower() in CAPTION_NAMES:
        return "caption"
    return own_name(name)
