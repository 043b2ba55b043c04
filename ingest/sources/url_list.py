"""How lists of URLs are read: Parquet, CSV, TSV, JSON or text, unpacked.

A list becomes a stream of tables with the columns `url`, `caption`, `labels`, and whatever else it has; what
is called like a column of ours gets `source_` before its name. Which of its columns are URL, caption and
labels is said, or seen from their names. Columns of Parquet have their types; those of all other lists are
text, unless their types are given. A line that is no row, and a row without a URL, are rows with a problem.

Lists come from strangers: all of this runs in a fenced process (`ingest.sources.url_listing`).
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest.dataset.schema import LABELS, TAKEN_NAMES
from ingest.sources.column_values import as_labels, as_text, cast_to, plain
from ingest.sources.delimited import Part, read_delimited, refuse_many_columns
from ingest.sources.json_rows import read_json
from ingest.sources.text_blocks import LongLineError, Opened, blocks

FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# As lists found in the wild name them; the first that is there counts.
PATH_NAMES = ("path", "file_name", "filename", "file", "filepath", "image_path")
URL_NAMES = ("url", "image_url", "imageurl", "image", "link", "img", "src", *PATH_NAMES)
CAPTION_NAMES = ("caption", "text", "alt", "alt_text", "top_caption", "title", "description")
LABEL_NAMES = ("labels", "label", "hashtags", "tags")
# What the values of a column can be said to be.
TYPES = {
    "text": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "date": pa.date32(),
    "time": pa.timestamp("us"),
}
_NAMES_SHOWN = 40
# Rows that are looked at to know what a list is.
_LOOKED_AT = 1_000
_BATCH_ROWS = 65_536
# Of a column, read at a time: its pages lie together, up to all of a file.
PARQUET_BUFFER = 8 << 20
_OWN = ("url", "caption", "labels")
_ADDRESS = re.compile(r"\s*https?://", re.IGNORECASE)
_DAMAGE = (pa.ArrowInvalid, pa.ArrowNotImplementedError, EOFError, LongLineError)
# A name and a password before the host: https://me:secret@host/a.jpg.
_CREDENTIALS = r"^([A-Za-z][A-Za-z0-9+.-]*:[/\\]*)[^/?#\\]*@"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A list's columns.

    Attributes:
        url, caption, labels: their names; None: seen from the names in the list.
        names: of all columns of a CSV or TSV, whose first line is then a row.
        types: of columns by their names: keys of TYPES.
    """

    url: str | None = None
    caption: str | None = None
    labels: str | None = None
    names: tuple[str, ...] | None = None
    types: Mapping[str, str] = field(default_factory=dict)


class UrlList:
    """One list of URLs; see the module's docstring.

    Args:
        opened: opens it, unpacked.
        location: what to call it.
        kind: a value of FORMATS.
        columns: which of its columns mean what.

    Attributes:
        used: what it calls its columns: url, caption, labels; None where it has none.

    Raises:
        UserError: it has no column of URLs.
    """

    def __init__(self, opened: Opened, location: str, kind: str, columns: Columns) -> None:
        self.name = name_of(location)
        self._opened = opened
        self._location = location
        self._format = kind
        self._columns = columns
        # Those of the first part with rows stand for all.
        first = next((part for part in self._raw() if part.table.num_columns or part.odd), None)
        self._names: list[str] = [] if first is None else first.table.column_names
        if first is not None and first.odd and not len(first.table):
            raise UserError(f"the list {location} is not {self._format}: {first.odd[0]} is no row of one")
        names = self._names
        if repeated := [name for name, times in Counter(names).items() if times > 1]:
            raise UserError(f"{location} has several columns {shown(repeated[:1])!r}: rename all but one")
        if columns.names is None and self._format in ("csv", "tsv") and any(map(_ADDRESS.match, names)):
            example = ["url" if _ADDRESS.match(name) else f"column{n}" for n, name in enumerate(names, 1)]
            raise UserError(
                f"{location} has no header, as there is a URL in its first line: name its columns in their "
                f"order, such as --columns {','.join(example)}"
            )
        self._url = self._find("--url-column", columns.url, URL_NAMES)
        if names and self._url is None:
            raise UserError(
                f"{location} has no column that is named like a URL, only {shown(names)}: "
                "say which it is with --url-column"
            )
        self._caption = self._find("--caption-column", columns.caption, CAPTION_NAMES)
        self._labels = self._find("--label-column", columns.labels, LABEL_NAMES)
        for name in columns.types:
            self._find("--column-type", name, ())
        self.used = {"url": self._url, "caption": self._caption, "labels": self._labels}

    @property
    def extra(self) -> pa.Schema:
        """Its further columns: those of the first table, which stands for all; without rows it has none."""
        first = next(self.tables(), None)
        return pa.schema([] if first is None else [each for each in first.schema if each.name not in _OWN])

    def rows(self) -> Iterator[pa.Table]:
        """See `Listing`. The path of a row without a URL, and of a line that is no row, says where it is."""
        before = 0
        for part in self._raw():
            table, misread = self._typed(part.table)
            if len(table):
                urls = _without_credentials(pc.utf8_trim_whitespace(table["url"]))
                blank = pc.equal(urls, "")
                if pc.any(blank).as_py():
                    places = [f"{self.name} row {before + number}" for number in range(1, len(table) + 1)]
                    urls = pc.if_else(blank, pa.array(places), urls)
                problems = pc.if_else(blank, "no_url", pc.if_else(misread, "misread_value", ""))
                yield _attempts(urls, problems, table.drop_columns("url"))
            before += len(table)
            if part.odd:
                places = [f"{self.name} {place}" for place in part.odd]
                labels = pa.array([[]] * len(places), LABELS)
                yield _attempts(places, ["malformed_row"] * len(places), pa.table({"labels": labels}))

    def tables(self) -> Iterator[pa.Table]:
        """The rows in order, as tables: url (string), caption (string or null), labels (list), other columns.

        Raises:
            UserError: the list is damaged.
        """
        for part in self._raw():
            if len(part.table):
                yield self._typed(part.table)[0]

    def _typed(self, table: pa.Table) -> tuple[pa.Table, pa.Array]:
        """A part's rows as `tables` has them; and which of them have a value that is not of its type."""
        misread = pa.array(np.zeros(len(table), bool))
        if not table.num_columns:
            return table, misread
        for name in self._names:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table)))
        for name, kind in self._columns.types.items():
            column, wrong = cast_to(TYPES[kind], table[name])
            table = table.set_column(table.column_names.index(name), name, column)
            misread = pc.or_(misread, wrong)
        used = (self._url, self._caption, self._labels)
        others = own_names([name for name in self._names if name not in used])
        kept = {*self._columns.types} if self._format != "parquet" else {*self._names}
        columns = {
            "url": as_text(table[self._url]).fill_null(""),
            "caption": pa.nulls(len(table), pa.string())
            if self._caption is None
            else as_text(table[self._caption]),
            "labels": as_labels(table[self._labels] if self._labels else None, len(table)),
            **{
                own: plain(table[name]) if name in kept else as_text(table[name])
                for name, own in others.items()
            },
        }
        return pa.table(columns), misread

    def _find(self, option: str, chosen: str | None, usual: Sequence[str]) -> str | None:
        names = self._names
        if chosen is not None and names:
            if chosen not in names:
                raise UserError(
                    f"{self._location} has no column {chosen!r}: give {option} one of {shown(names)}"
                )
            return chosen
        lower = {name.lower(): name for name in reversed(names)}
        return next((lower[name] for name in usual if name in lower), None)

    def _raw(self) -> Iterator[Part]:
        """The parts of the file as they are read.

        Raises:
            UserError: it cannot be read to its end.
        """
        row = 0
        names: set[str] = set()
        try:
            for part in self._parts():
                refuse_many_columns(self._location, part.table.num_columns)
                names = names or set(part.table.column_names)
                if new := [name for name in part.table.column_names if name not in names]:
                    first = pc.index(pc.is_valid(part.table[new[0]]), True).as_py()
                    raise UserError(
                        f"{self._location} has a column {new[0]!r} from row {row + first + 1:,} on that none "
                        f"of its first {row:,} rows has: give it to the first row, too, as null"
                    )
                row += len(part.table)
                yield part
        except MemoryError:
            raise
        except (*_DAMAGE, OSError) as error:
            said = " ".join(str(error).split())[:1_000] or type(error).__name__
            # Decompressors raise OSError, without a number.
            if isinstance(error, OSError) and error.errno is not None:
                said = error.strerror or said
                raise UserError(f"{self._location} cannot be read behind row {row:,}: {said}") from error
            raise UserError(
                f"the list {self._location} is damaged, or not {self._format}, behind row {row:,}: {said}"
            ) from error

    def _parts(self) -> Iterator[Part]:
        match self._format:
            case "parquet":
                return _parquet(self._opened, self._location)
            case "json" | "jsonl":
                return read_json(self._opened)
            case "txt":
                return _txt(self._opened)
        return read_delimited(self._opened, self._format, self._columns.names, place=self._location)


def look(opened: Opened, *, location: str, kind: str, columns: Mapping[str, Any]) -> Iterator[pa.Table]:
    """What a list is: a table without rows, of its further columns, with the names of those that are used as
    metadata; and one of the first paths that it plans.
    """
    listed = UrlList(opened, location, kind, Columns(**columns))
    yield pa.table(listed.extra.empty_table()).replace_schema_metadata({"used": json.dumps(listed.used)})
    paths = (
        path
        for table in listed.rows()
        for path, problem in zip(table["path"].to_pylist(), table["problem"].to_pylist(), strict=True)
        if not problem
    )
    yield pa.table({"path": pa.array(islice(paths, _LOOKED_AT), pa.binary())})


def rows(opened: Opened, *, location: str, kind: str, columns: Mapping[str, Any]) -> Iterator[pa.Table]:
    """A list's rows to plan; see `UrlList.rows`."""
    return UrlList(opened, location, kind, Columns(**columns)).rows()


def shown(names: Sequence[str]) -> str:
    """Names of a stranger's columns, some of them."""
    some = ", ".join(name if len(name) <= 80 else f"{name[:80]}…" for name in names[:_NAMES_SHOWN])
    return some + (f" and {len(names) - _NAMES_SHOWN:,} others" if len(names) > _NAMES_SHOWN else "")


def name_of(location: str) -> str:
    """The file's name, without a URL's query."""
    return PurePosixPath(_path(location)).name


def _path(location: str) -> str:
    """A local path; of a URL, what stands before its query: https://host/a.parquet?download=true."""
    return urlsplit(location).path if "://" in location else location


def list_format(location: str) -> tuple[str, str | None] | None:
    """Format and compression by the name, such as ("csv", "gzip"); None if it is not named like a list."""
    path = PurePosixPath(_path(location).lower())
    compression = COMPRESSIONS.get(path.suffix)
    kind = FORMATS.get(path.with_suffix("").suffix if compression else path.suffix)
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def _parquet(opened: Opened, place: str) -> Iterator[Part]:
    with opened() as file, pq.ParquetFile(file, buffer_size=PARQUET_BUFFER) as parquet:
        refuse_many_columns(place, parquet.metadata.num_columns)
        for batch in parquet.iter_batches(_BATCH_ROWS, use_threads=False):
            yield Part(pa.Table.from_batches([batch]))


def _txt(opened: Opened) -> Iterator[Part]:
    """A URL per line; empty lines, and those that begin with #, are none."""
    for block in blocks(opened):
        lines = map(str.strip, re.split(r"[\r\n]+", block.decode("utf-8", "backslashreplace")))
        urls = [line for line in lines if line and not line.startswith("#")]
        for start in range(0, len(urls), _BATCH_ROWS):
            yield Part(pa.table({"url": pa.array(urls[start : start + _BATCH_ROWS], pa.string())}))


def _attempts(paths: Any, problems: Any, further: pa.Table) -> pa.Table:
    """Rows to plan, of these paths."""
    none = pa.array(np.zeros(len(further), np.uint64))
    texts = pa.array(paths) if isinstance(paths, list) else paths
    own = {"path": texts.cast(pa.binary()), "offset": none, "size": none, "problem": problems}
    return pa.table(own | {name: further[name] for name in further.column_names})


def _without_credentials(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pc.any(pc.match_substring_regex(urls, _CREDENTIALS)).as_py():
        return urls
    return pc.replace_substring_regex(urls, _CREDENTIALS, r"\1")


def own_names(names: Sequence[str], taken: Collection[str] = TAKEN_NAMES) -> dict[str, str]:
    """What a list's further columns are called in rows; none takes another's name, or one that is taken."""
    own = {name: name for name in names if name not in taken}
    for name in names:
        if name in taken:
            free = f"source_{name}"
            while free in own.values() or free in taken:
                free = f"source_{free}"
            own[name] = free
    return {name: own[name] for name in names}
