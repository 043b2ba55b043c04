"""`metadata.csv` and `metadata.jsonl` in a folder of images, as Hugging Face's imagefolder has them.

A row has `file_name`, relative to the file's folder, and says the same as a `.json` beside that image would
(see `ingest.sources.companions`). All of it is held in memory.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from cluster.errors import UserError
from ingest.sources.companions import said_by
from ingest.sources.source import Item
from ingest.sources.text_blocks import as_utf8

NAMES = (b"metadata.csv", b"metadata.jsonl")
_FILE = "file_name"


class FolderMetadata:
    """What a metadata file says of the files below its folder.

    Args:
        folder: "" or a path that ends in a slash.
        rows: by the path below the folder.
        above: that of a folder further up, which counts for what this one does not name.
    """

    def __init__(
        self, folder: bytes, rows: dict[bytes, dict[str, Any]], above: "FolderMetadata | None"
    ) -> None:
        self._above = above
        self._folder = folder
        self._rows = rows
        self._missing = dict.fromkeys(rows)

    def about(self, path: bytes) -> dict[str, Any]:
        """Caption, labels and extra of a file, as far as they are said."""
        below = path.removeprefix(self._folder)
        self._missing.pop(below, None)
        inherited = self._above.about(path) if self._above else {}
        return self._rows.get(below, inherited)

    def missing(self) -> Iterator[Item]:
        """Rows whose files were not asked for: they are not there."""
        for below in self._missing:
            yield Item(self._folder + below, problem="file_missing", **self._rows[below])


def csv_rows(lines: Iterable[list[str]]) -> Iterator[dict[str, str]]:
    """Rows by the names in the first; values that are left out at a row's end are not in it.

    Raises:
        ValueError: a row has more values than the first.
    """
    lines = iter(lines)
    names = next(lines, [])
    for number, values in enumerate(lines, 1):
        if len(values) > len(names):
            raise ValueError(
                f"row {number} has {len(values)} values, and the header has {len(names)}: put quotes around "
                "those with commas"
            )
        if any(values):
            yield dict(zip(names, values, strict=False))


def read_metadata(
    folder: bytes, name: bytes, data: bytes, *, root: bytes, above: FolderMetadata | None
) -> FolderMetadata | None:
    """A metadata file; None if it is another one that is called so, without `file_name`.

    Args:
        folder: see `FolderMetadata`.
        name, data: of the file.
        root: the whole path of what `folder` lies in.
        above: see `FolderMetadata`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        text = io.StringIO(as_utf8(data).decode(), newline="")
        if name.endswith(b".csv"):
            rows: list[Any] = list(csv_rows(csv.reader(text, strict=True)))
        else:
            rows = [json.loads(line, parse_constant=str) for line in text if line.strip()]
        if not rows or not all(isinstance(row, dict) and isinstance(row.get(_FILE), str) for row in rows):
            return None
        said: dict[bytes, dict[str, Any]] = {}
        for row in rows:
            values = {key: value for key, value in row.items() if key and value not in (None, "")}
            path = values.pop(_FILE).removeprefix("./").encode("utf-8", "backslashreplace")
            said[path] = {key: value for key, value in said_by(values).items() if value}
    except (ValueError, csv.Error, RecursionError) as error:
        shown = b"/".join([root, folder + name]).decode("utf-8", "backslashreplace")
        raise UserError(f"{shown} cannot be read ({error}): mend it, or give it another name") from error
    return FolderMetadata(folder, said, above)
