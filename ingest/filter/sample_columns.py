"""The entries of a list of samples, as a fenced process reads them (`ingest.filter.sample_list`)."""

import codecs
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from cluster.errors import UserError

_COLUMNS = ("key", "url")
_TABLES = (".parquet", ".csv", ".tsv")
_KEY = re.compile(r"[0-9]{13}", re.ASCII)
_BLOCK_BYTES, _LONGEST_LINE = 8 << 20, 64 << 20
# Opens the file from its beginning.
_Opened = Callable[[], AbstractContextManager[Any]]


def rows(opened: _Opened, *, location: str) -> Iterator[pa.Table]:
    """Keys and URLs as texts, null where there is none.

    Raises:
        UserError: it is not what its name says, has neither column, or keys that are none.
    """
    if not location.lower().endswith(_TABLES):
        yield from map(_entries, _texts_of_lines(opened, location))
        return
    try:
        batches = _parquet(opened) if location.lower().endswith(".parquet") else _delimited(opened, location)
        names = next(batches)
        if not {*names} & {*_COLUMNS}:
            some = ", ".join(sorted(names)[:40])
            raise UserError(f"{location} has neither a column key nor a column url: it has {some}")
        for batch in batches:
            table = pa.table({name: _texts(batch, name) for name in _COLUMNS})
            for key in table["key"].drop_null().to_pylist():
                if not (key.isascii() and key.isdigit() and len(key) <= 13):
                    raise UserError(
                        f"{location} has {key[:80]!r} in its column key: keys of samples have 13 digits"
                    )
            yield table
    except MemoryError:
        raise
    except (pa.ArrowException, EOFError) as error:
        raise UserError(f"{location} cannot be read: {str(error).splitlines()[0][:1_000]}") from error


def _texts_of_lines(opened: _Opened, location: str) -> Iterator[str]:
    with opened() as file:
        block = file.read(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8)
        while block:
            block += file.readline(_LONGEST_LINE)
            if len(block) >= _LONGEST_LINE:
                raise UserError(f"{location} has a line of more than {_LONGEST_LINE >> 20} MB: mend it")
            try:
                yield block.decode()
            except UnicodeDecodeError:
                if b"\0" in block:
                    raise UserError(f"{location} is no text: give .txt, .csv, .tsv or .parquet") from None
                yield block.decode("utf-8", "backslashreplace")
            block = file.read(_BLOCK_BYTES)


def _entries(text: str) -> pa.Table:
    """Of a text with a key or a URL a line."""
    entries = [entry for line in text.splitlines() if (entry := line.strip())]
    keys = [entry if _KEY.fullmatch(entry) else None for entry in entries]
    urls = [entry if key is None else None for entry, key in zip(entries, keys, strict=True)]
    return pa.table({"key": pa.array(keys, pa.string()), "url": pa.array(urls, pa.string())})


def _parquet(opened: _Opened) -> Iterator[Any]:
    """The names of its columns, and then batches of those that count."""
    with opened() as file, pq.ParquetFile(file, buffer_size=8 << 20) as parquet:
        names = parquet.schema_arrow.names
        yield names
        counts = [name for name in _COLUMNS if name in names]
        yield from parquet.iter_batches(columns=counts, use_threads=False)


def _delimited(opened: _Opened, location: str) -> Iterator[Any]:
    parse = pa_csv.ParseOptions(delimiter="\t" if location.lower().endswith(".tsv") else ",")
    with opened() as file:
        header = pa_csv.open_csv(file, parse_options=parse).schema.names
    yield header
    texts = pa_csv.ConvertOptions(
        column_types=dict.fromkeys(_COLUMNS, pa.string()),
        include_columns=[name for name in _COLUMNS if name in header],
    )
    with opened() as file:
        yield from pa_csv.open_csv(file, parse_options=parse, convert_options=texts)


def _texts(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name not in batch.schema.names:
        return pa.nulls(len(batch), pa.string())
    texts = [None if value in (None, "") else str(value) for value in batch[name].to_pylist()]
    return pa.array(texts, pa.string())
