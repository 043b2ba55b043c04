"""Rows in the order of a plan, cut into units."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from ingest.dataset.plan_record import SourceKind
from ingest.dataset.schema import SPAN_COLUMNS
from ingest.plan.by_lane import ByLane
from ingest.web.url import canonical_all

# Of a unit's rows: whoever works on it has them in memory. Usual ones take 3 MB.
_CHUNK_BYTES = 128 << 20


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
    """The table with the addresses that its rows name, each in its one spelling, as columns, too: in `url`,
    and of what is a part of a file, that of the file in `file`.

    What is no address is one by itself, and so is a part of what an address leads to. Rows that have a
    problem have none.
    """
    files = urls = canonical_all(table["path"].cast(pa.string()))
    part = pa.array(np.zeros(len(table), bool))
    if set(SPAN_COLUMNS.names) <= set(table.column_names):
        start, end = (table[name].cast(pa.string()) for name in SPAN_COLUMNS.names)
        # No canonical address has a fragment of its own.
        parts = pc.binary_join_element_wise(urls, start, end, "#")
        part = pc.is_valid(parts)
        urls = pc.if_else(part, parts, urls)
    well = pc.equal(table["problem"], "")
    table = table.append_column("url", pc.if_else(well, urls, None))
    return table.append_column("file", pc.if_else(pc.and_(well, part), files, None))


def in_units(tables: Iterable[pa.Table], rows: int, *, kinds: Sequence[SourceKind]) -> Iterator[pa.Table]:
    """The rows of sources without sites in units, one table each.

    Args:
        tables: columns of ITEMS_SCHEMA, and further ones.
        rows: of a unit.
        kinds: of the sources, by their numbers. Those that stay in place have units of their own rows only.
    """

    def owner(table: pa.Table) -> int | None:
        source: int = table["source"][0].as_py()
        return source if kinds[source].stays_in_place else None

    for _, group in groupby((table for table in tables if len(table)), key=owner):
        yield from rechunked(group, rows)


def in_lanes(urls: ByLane, rows: int, lengths: list[int]) -> Iterator[pa.Table]:
    """The rows with URLs in units, one table each, cut within their lanes.

    Args:
        urls: all of them.
        rows: of a unit.
        lengths: gets the number of units of each lane that has any.
    """
    for _, lane in groupby(urls.lanes(rows), key=itemgetter(0)):
        lengths.append(0)
        for unit in rechunked((table for _, table in lane), rows):
            lengths[-1] += 1
            yield unit
