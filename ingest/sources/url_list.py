"""Lists of URLs: Parquet, CSV, TSV, JSON Lines or text, plain, gzip or zstd, here, in a bucket or at a URL.

A list becomes a stream of tables with the columns `url`, `caption`, `labels`, and whatever else it has, as it
is; what is called like a column of ours gets `source_` before its name. Which of its columns are URL, caption
and labels is said, or seen from their names.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from pyarrow import csv

from cluster.errors import UserError
from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.dataset.schema import LABELS, META_SCHEMA
from ingest.store.files import matching, open_file

FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# As lists found in the wild name them; the first that is there counts.
URL_NAMES = ("url", "image_url", "imageurl", "image", "link", "img", "src")
CAPTION_NAMES = ("caption", "text", "alt", "alt_text", "top_caption", "title", "description")
LABEL_NAMES = ("labels", "label", "hashtags", "tags")
_BATCH_ROWS = 65_536
_BLOCK_BYTES = 8 << 20
# Names of columns that plans and shards have of their own.
_TAKEN = {*META_SCHEMA.names, "domain", "path", "problem", "source"}
_OWN = ("url", "caption", "labels")
# Opens a list, unpacked, from its beginning.
_Opened = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of a list's columns; None: seen from the names in the list."""

    url: str | None = None
    caption: str | None = None
    labels: str | None = None


class UrlList:
    """One list of URLs; see the module's docstring.

    Args:
        location: what `open_file` opens.
        columns: which of its columns mean what.

    Raises:
        UserError: it is not there, or has no column of URLs.
    """

    kind = SourceKind.URLS

    def __init__(self, location: str, columns: Columns) -> None:
        self.name = PurePosixPath(location).name
        self._location = location
        self._format, self._compression = cast(tuple[str, str | None], list_format(location))
        self._columns = columns
        first = next(iter(self._raw()), None)
        names = [] if first is None else first.column_names
        if repeated := [name for name, times in Counter(names).items() if times > 1]:
            raise UserError(f"{location} has several columns {repeated[0]!r}: rename all but one")
        self._url = self._find("--url-column", columns.url, URL_NAMES, names) if names else None
        if names and self._url is None:
            raise UserError(
                f"{location} has no column that is named like a URL, only {', '.join(names)}: "
                "say which it is with --url-column"
            )
        self._caption = self._find("--caption-column", columns.caption, CAPTION_NAMES, names)
        self._labels = self._find("--label-column", columns.labels, LABEL_NAMES, names)

    def close(self) -> None:
        """Nothing stays open."""

    def describe(self, listed: Callable[[int], None]) -> SourceRecord:
        """What the list is: a digest of its bytes, and which columns are used. Its rows are not looked at."""
        with self._open() as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        used = {"url": self._url, "caption": self._caption, "labels": self._labels}
        return SourceRecord(kind=self.kind, name=self.name, sha256=digest, columns=used)

    @property
    def extra(self) -> pa.Schema:
        """Its further columns: those of the first table, which stands for all; without rows it has none."""
        first = next(self.tables(), None)
        return pa.schema([] if first is None else [each for each in first.schema if each.name not in _OWN])

    def rows(self) -> Iterator[pa.Table]:
        for table in self.tables():
            none = pa.array([0] * len(table), pa.uint64())
            columns = {
                "path": table["url"].cast(pa.binary()),
                "offset": none,
                "size": none,
                "problem": pa.array([""] * len(table), pa.string()),
            }
            further = {name: table[name] for name in table.column_names if name != "url"}
            yield pa.table(columns | further)

    def tables(self) -> Iterator[pa.Table]:
        """The rows in order, as tables: url (string), caption (string or null), labels (list), other columns.

        Raises:
            UserError: the list is damaged.
        """
        for table in self._raw():
            used = (self._url, self._caption, self._labels)
            others = _own_names([name for name in table.column_names if name not in used])
            yield pa.table(
                {
                    "url": _as_text(table[self._url]).fill_null(""),
                    "caption": pa.nulls(len(table), pa.string())
                    if self._caption is None
                    else _as_text(table[self._caption]),
                    "labels": _as_labels(table[self._labels] if self._labels else None, len(table)),
                    **{own: _plain(table[name]) for name, own in others.items()},
                }
            )

    def _find(
        self, option: str, chosen: str | None, usual: Sequence[str], names: Sequence[str]
    ) -> str | None:
        if chosen is not None:
            if chosen not in names:
                raise UserError(
                    f"{self._location} has no column {chosen!r}: give {option} one of {', '.join(names)}"
                )
            return chosen
        lower = {name.lower(): name for name in reversed(names)}
        return next((lower[name] for name in usual if name in lower), None)

    def _open(self) -> Any:
        try:
            return open_file(self._location)
        except (OSError, ImportError, ValueError) as error:
            raise UserError(f"the list {self._location} cannot be opened: {error}") from error

    def _raw(self) -> Iterator[pa.Table]:
        try:
            yield from _READERS[self._format](self._unpacked)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, EOFError) as error:
            says = f"the list {self._location} is damaged, or not {self._format}: {error}"
            if self._format in ("csv", "tsv", "jsonl"):
                says += (
                    "; if a column comes, or changes its type, after the first 8 MB: make the list Parquet"
                )
            raise UserError(says) from error

    @contextmanager
    def _unpacked(self) -> Iterator[Any]:
        with self._open() as file:
            yield file if self._compression is None else pa.CompressedInputStream(file, self._compression)


def list_format(location: str) -> tuple[str, str | None] | None:
    """Format and compression by the name, such as ("csv", "gzip"); None if it is not named like a list."""
    path = PurePosixPath(location.lower())
    compression = COMPRESSIONS.get(path.suffix)
    kind = FORMATS.get(path.with_suffix("").suffix if compression else path.suffix)
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def expand(location: str) -> list[str]:
    """The lists that a pattern with * names, in order of their names; a location without one is itself."""
    if "*" not in location:
        return [location]
    found = matching(location)
    if not found:
        raise UserError(f"no file matches {location}")
    return found


def _parquet(opened: _Opened) -> Iterator[pa.Table]:
    with opened() as file, pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(_BATCH_ROWS, use_threads=False):
            yield pa.Table.from_batches([batch])


def _csv(opened: _Opened, *, delimiter: str = ",") -> Iterator[pa.Table]:
    def reader(file: Any, types: dict[str, pa.DataType]) -> csv.CSVStreamingReader:
        return csv.open_csv(
            file,
            read_options=csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(strings_can_be_null=True, column_types=types),
        )

    with opened() as file:
        first = reader(file, {}).schema
    # A column that is empty in the first block may have texts later, and one of texts may have odd bytes.
    texts = [each.name for each in first if pa.types.is_null(each.type) or _is_bytes_or_text(each.type)]
    with opened() as file:
        for batch in reader(file, dict.fromkeys(texts, pa.binary())):
            yield pa.Table.from_batches([batch])


def _tsv(opened: _Opened) -> Iterator[pa.Table]:
    return _csv(opened, delimiter="\t")


def _jsonl(opened: _Opened) -> Iterator[pa.Table]:
    def reader(file: Any, schema: pa.Schema | None) -> Any:
        return pa_json.open_json(
            file,
            read_options=pa_json.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
            parse_options=pa_json.ParseOptions(explicit_schema=schema),
        )

    with opened() as file:
        first = reader(file, None).schema
    # What is empty in the first block may have texts later.
    texts = {pa.null(): pa.string(), pa.list_(pa.null()): pa.list_(pa.string())}
    schema = pa.schema([each.with_type(texts.get(each.type, each.type)) for each in first])
    with opened() as file:
        for batch in reader(file, schema):
            yield pa.Table.from_batches([batch])


def _txt(opened: _Opened) -> Iterator[pa.Table]:
    """A URL per line; empty lines, and those that begin with #, are none."""
    with opened() as file:
        lines = io.TextIOWrapper(io.BufferedReader(file, _BLOCK_BYTES), "utf-8-sig", "backslashreplace")
        urls = (line for line in (line.strip() for line in lines) if line and not line.startswith("#"))
        for batch in _batches(urls):
            yield pa.table({"url": pa.array(batch, pa.string())})


def _batches(items: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


_READERS = {"parquet": _parquet, "csv": _csv, "tsv": _tsv, "jsonl": _jsonl, "txt": _txt}


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any column as text; bytes that are no UTF-8 show as \\x escapes."""
    column = _decoded(column)
    if _is_bytes_or_text(column.type):
        column = column.cast(pa.binary())
        try:
            return column.cast(pa.string())
        except pa.ArrowInvalid:
            texts = [None if x is None else x.decode("utf-8", "backslashreplace") for x in column.to_pylist()]
            return pa.chunked_array([pa.array(texts, pa.string())])
    if pa.types.is_nested(column.type):
        texts = [
            None if x is None else json.dumps(x, default=str, sort_keys=True) for x in column.to_pylist()
        ]
        return pa.chunked_array([pa.array(texts, pa.string())])
    return column.cast(pa.string())


def _as_labels(column: pa.ChunkedArray | None, rows: int) -> pa.ChunkedArray:
    """Lists of text. A text is one label, or several between commas, or hashtags between spaces."""
    if column is None:
        return pa.chunked_array([pa.array([[]] * rows, LABELS)])
    column = _decoded(column)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        values = [
            [str(label) for label in labels or () if label is not None] for labels in column.to_pylist()
        ]
    else:
        values = [split_labels(text) for text in _as_text(column).to_pylist()]
    return pa.chunked_array([pa.array(values, LABELS)])


def split_labels(text: str | None) -> list[str]:
    """Labels in a text: `#sky #sea` or `sky, sea`."""
    if not text:
        return []
    if "#" in text:
        return [word.lstrip("#") for word in text.replace(",", " ").replace("#", " #").split() if word != "#"]
    return [label.strip() for label in text.split(",") if label.strip()]


def _own_names(names: Sequence[str]) -> dict[str, str]:
    """What a list's further columns are called in rows; none takes another's name."""
    own = {name: name for name in names if name not in _TAKEN}
    for name in names:
        if name in _TAKEN:
            free = f"source_{name}"
            while free in own.values() or free in _TAKEN:
                free = f"source_{free}"
            own[name] = free
    return {name: own[name] for name in names}


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column that filters can work on: numbers, truth values and times as they are, all else as text."""
    column = _decoded(column)
    kind = column.type
    as_it_is = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return column if as_it_is or pa.types.is_temporal(kind) else _as_text(column)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.dictionary_decode(column) if pa.types.is_dictionary(column.type) else column


def _is_bytes_or_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )
