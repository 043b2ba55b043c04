"""`metadata.csv` and `metadata.jsonl` in a folder of images, as Hugging Face's imagefolder has them.

A row has `file_name`, relative to the file's folder, and says the same as a `.json` beside that image would
(see `ingest.sources.companions`). All of it is held in memory, within a bound.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from cluster.errors import UserError
from ingest.fence.reading import read_fenced
from ingest.sources.companions import said_by
from ingest.sources.source import Item
from ingest.sources.text_blocks import Opened, blocks

NAMES = (b"metadata.csv", b"metadata.jsonl")
_FILE = "file_name"
_ROWS_AT_A_TIME = 1 << 12
_SAID = pa.schema([pa.field("path", pa.binary()), pa.field("said", pa.string())])
# Bytes, for all that is said of the files of a folder, there and above; and for each row, besides its text.
_MOST_HELD, _HELD_PER_ROW = 1 << 30, 200


class FolderMetadata:
    """What a metadata file says of the files below its folder.

    Args:
        folder: "" or a path that ends in a slash.
        rows: JSON by the path below the folder.
        above: that of a folder further up, which counts for what this one does not name.
        held: bytes of memory that this takes, with those above.
    """

    def __init__(
        self, folder: bytes, rows: dict[bytes, str], above: "FolderMetadata | None", *, held: int
    ) -> None:
        self.held = held
        self._above = above
        self._folder = folder
        self._rows = rows
        self._missing = dict.fromkeys(rows)

    def about(self, path: bytes) -> dict[str, Any]:
        """Caption, labels and extra of a file, as far as they are said."""
        below = path.removeprefix(self._folder)
        self._missing.pop(below, None)
        inherited = self._above.about(path) if self._above else {}
        return _about(self._rows[below]) if below in self._rows else inherited

    def missing(self) -> Iterator[Item]:
        """Rows whose files were not asked for: they are not there."""
        for below in self._missing:
            yield Item(self._folder + below, problem="file_missing", **_about(self._rows[below]))


def _about(said: str) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(said)
    return about | ({"labels": tuple(about["labels"])} if "labels" in about else {})


def csv_rows(lines: Iterable[list[str]]) -> Iterator[dict[str, str]]:
    """Rows by the names in the first; values that are left out at a row's end are not in it. An empty row is
    {}.

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
        yield dict(zip(names, values, strict=False)) if any(values) else {}


def read_metadata(
    folder: bytes, name: bytes, file: io.BufferedIOBase, *, root: bytes, above: FolderMetadata | None
) -> FolderMetadata | None:
    """A metadata file; None if it is another one that is called so, without `file_name`.

    Args:
        folder: see `FolderMetadata`.
        name, file: its name, and it.
        root: the whole path of what `folder` lies in.
        above: see `FolderMetadata`.

    Raises:
        UserError: it cannot be read, or says too much.
    """
    shown = b"/".join([root, folder + name]).decode("utf-8", "backslashreplace")
    said: dict[bytes, str] = {}
    held = above.held if above else 0
    for table in read_fenced(rows, [file], {"location": shown}, place=shown):
        if not table.num_columns:
            return None
        for path, about in zip(table["path"].to_pylist(), table["said"].to_pylist(), strict=True):
            held += len(path) + len(about) + _HELD_PER_ROW
            if held > _MOST_HELD:
                raise UserError(
                    f"{shown} says too much to be held in memory, with those above it: give it as the "
                    "source in place of the folder, as a list of files"
                )
            said[path] = about
    return FolderMetadata(folder, said, above, held=held)


def rows(opened: Opened, *, location: str) -> Iterator[pa.Table]:
    """Paths, and what is said of them in JSON, as a fenced process reads them; a table without columns where
    a row has no `file_name`, or there is none at all.

    Raises:
        UserError: the file is damaged.
    """
    try:
        yield from _rows(_csv(opened) if location.endswith(".csv") else _json_lines(opened))
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{location} cannot be read ({error}): mend it, or give it another name") from error


def _rows(found: Iterator[Any]) -> Iterator[pa.Table]:
    batch: list[dict[str, Any]] = []
    count = 0
    for row in found:
        if not isinstance(row, dict) or not isinstance(row.get(_FILE), str):
            yield pa.table({})
            return
        values = {key: value for key, value in row.items() if key and value not in (None, "")}
        path = values.pop(_FILE).removeprefix("./").encode("utf-8", "backslashreplace")
        about = {key: value for key, value in said_by(values).items() if value}
        batch.append({"path": path, "said": json.dumps(about)})
        count += 1
        if len(batch) == _ROWS_AT_A_TIME:
            yield pa.Table.from_pylist(batch, _SAID)
            batch = []
    yield pa.Table.from_pylist(batch, _SAID) if count else pa.table({})


def _csv(opened: Opened) -> Iterator[Any]:
    # Not line by line as `str.splitlines` has them: values have line ends of their own.
    text = (line.decode() for block in blocks(opened) for line in block.splitlines(keepends=True))
    yield from filter(None, csv_rows(csv.reader(text, strict=True)))


def _json_lines(opened: Opened) -> Iterator[Any]:
    for block in blocks(opened):
        for line in block.splitlines():
            if line.strip():
                yield json.loads(line.decode(), parse_constant=str)
