"""Rows in the order of a plan, cut into units."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from ingest.dataset.plan_record import SourceKind
from ingest.dataset.schema import SPAN_COLUMNS
from ingest.web.domain import domain_hashes
from ingest.web.url import canonical_all

# Of a unit's rows: whoever works on it has them in memory. Usual ones take 3 MB.
_CHUNK_BYTES = 128 << 20


def taking_turns(table: pa.Table) -> pa.Table:
    """The same rows so that sites take turns: the first URL of each, then the second of each, and so on.

    That is about the order in which they will be fetched: then little has to wait for its place in a shard.
    `path` is the column with the URLs, as bytes.
    """
    hashes = domain_hashes(table["path"].cast(pa.string()))
    together = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.diff(hashes[together], prepend=hashes[together][:1] + np.uint64(1)))
    turn = np.empty(len(table), np.int64)
    turn[together] = np.arange(len(table)) - np.repeat(starts, np.diff([*starts, len(table)]))
    return table.take(np.argsort(turn, kind="stable"))


def rechunked(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` each, the last one shorter; also those whose texts are very long."""
    held: list[pa.Table] = []
    count = size = 0
    for table in tables:
        held.append(table)
        count, size = count + len(table), size + table.nbytes
        while count >= rows or size >= _CHUNK_BYTES:
            whole = pa.concat_tables(held)
            yield whole.slice(0, rows)
            held = [whole.slice(rows)]
            count, size = len(held[0]), held[0].nbytes
    if count:
        yield pa.concat_tables(held)


def filled(table: pa.Table, schema: pa.Schema, *, name: str = "") -> pa.Table:
    """The table with all columns of the schema, in its order and types; absent ones are null."""
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    try:
        return pa.table(columns, names=schema.names).cast(schema)
    except pa.ArrowInvalid as error:
        raise UserError(f"the list {name} has a column of several types: {error}") from error


def with_url(table: pa.Table) -> pa.Table:
    """The table with the addresses that its rows name, each in its one spelling, as a column, too.

    What is no address is one by itself, and so is a part of what an address leads to. Rows that have a
    problem have none.
    """
    urls = canonical_all(table["path"].cast(pa.string()))
    if set(SPAN_COLUMNS.names) <= set(table.column_names):
        start, end = (table[name].cast(pa.string()) for name in SPAN_COLUMNS.names)
        # No canonical address has a fragment of its own.
        parts = pc.binary_join_element_wise(urls, start, end, "#")
        urls = pc.if_else(pc.is_valid(parts), parts, urls)
    return table.append_column("url", pc.if_else(pc.equal(table["problem"], ""), urls, None))


def in_units(tables: Iterable[pa.Table], rows: int, *, kinds: Sequence[SourceKind]) -> Iterator[pa.Table]:
    """The rows in units, one table each. In units that are all URLs, sites take turns.

    Args:
        tables: columns of ITEMS_SCHEMA, and further ones.
        rows: of a unit.
        kinds: of the sources, by their numbers. Those that stay in place have units of their own rows only.
    """
    fetched = pa.array([number for number, kind in enumerate(kinds) if kind.is_fetched], pa.uint32())

    def owner(table: pa.Table) -> int | None:
        source: int = table["source"][0].as_py()
        return source if kinds[source].stays_in_place else None

    for _, group in groupby((table for table in tables if len(table)), key=owner):
        for unit in rechunked(group, rows):
            all_urls = pc.all(pc.is_in(unit["source"], value_set=fetched)).as_py()
            yield taking_turns(unit) if all_urls else unit
