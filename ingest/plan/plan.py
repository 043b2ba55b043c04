"""The plan of a generation: immutable units of work, and everything that decides what they give.

It is two files: `plan/{g}/units-{sha16}.parquet`, published first, and the `plan.json` that names it, created
last if there is none.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.dataset.commit import canonical
from ingest.plan.by_domain import rechunked, taking_turns
from ingest.plan.settings import CrawlSettings
from ingest.sources.companions import COLUMNS
from ingest.sources.source import Item
from ingest.store.store import Store

_LABELS = pa.list_(pa.field("element", pa.string(), nullable=False))
ITEMS_SCHEMA = pa.schema(
    [
        pa.field("source", pa.uint32(), nullable=False),
        pa.field("path", pa.binary(), nullable=False),
        pa.field("offset", pa.uint64(), nullable=False),
        pa.field("size", pa.uint64(), nullable=False),
        pa.field("problem", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("labels", _LABELS, nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A frozen generation of units.

    Attributes:
        store: the dataset's files.
        generation: its number; the first is 0.
        description: what plan.json says.
    """

    store: Store
    generation: int
    description: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides the output, hex."""
        return str(self.description["fingerprint"])

    @property
    def units(self) -> range:
        """Unit numbers, which go on from the generation before."""
        first = self.description["first_unit"]
        return range(first, first + self.description["units"])

    @property
    def rows(self) -> int:
        """Attempts planned, over all units."""
        return int(self.description["rows"])

    @property
    def sources(self) -> list[dict[str, Any]]:
        """What each source is, by its number."""
        return list(self.description["sources"])

    @property
    def locations(self) -> list[str]:
        """Where each source was when it was planned."""
        return list(self.description["locations"])

    @property
    def settings(self) -> CrawlSettings:
        """What is made of the sources."""
        return CrawlSettings.from_flags(self.description["settings"])

    def table(self, unit: int) -> pa.Table:
        """The unit's attempts in order; columns of ITEMS_SCHEMA, and further ones."""
        name = self.description["items"]["name"]
        with self.store.open(name) as file, pq.ParquetFile(file, metadata=self._metadata) as parquet:
            return parquet.read_row_group(unit - self.units.start, use_threads=False)

    def items(self, unit: int) -> list[tuple[int, Item]]:
        """The unit's attempts in order: the source's number, and the item."""
        return [_item(row) for row in self.table(unit).to_pylist()]

    def columns(self) -> pa.Schema:
        """The columns of `table`."""
        return self._metadata.schema.to_arrow_schema().remove_metadata()

    def extra_columns(self) -> pa.Schema:
        """Those that rows of this generation have besides everyone's.

        Most tars have no companions: columns for what these say count only if there is something in them.
        """
        further = [field for field in self.columns() if field.name not in ITEMS_SCHEMA.names]
        return pa.schema(
            [field for field in further if field.name not in COLUMNS.names or self._has_values(field.name)]
        )

    def _has_values(self, column: str) -> bool:
        metadata = self._metadata
        paths = [metadata.schema.column(place).path for place in range(metadata.num_columns)]
        groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
        return any(
            group.column(paths.index(column)).statistics.null_count < group.num_rows for group in groups
        )

    @cached_property
    def _metadata(self) -> pq.FileMetaData:
        # Of the size of the plan: it is read once, not for every unit.
        with self.store.open(self.description["items"]["name"]) as file:
            return pq.read_metadata(file)


def _item(row: dict[str, Any]) -> tuple[int, Item]:
    source = row.pop("source")
    values = {name: row.pop(name) for name in ITEMS_SCHEMA.names[1:]}
    return source, Item(**values | {"labels": tuple(values["labels"])}, extra=row)


def read_plans(store: Store) -> list[Plan]:
    """The generations of a dataset, ascending; none if nothing was planned there."""
    plans: list[Plan] = []
    while True:
        try:
            description = json.loads(store.read(layout.plan_name(len(plans))))
        except FileNotFoundError:
            return plans
        plans.append(Plan(store=store, generation=len(plans), description=description))


def fingerprint_of(identity: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(identity)).hexdigest()


def publish_plan(
    store: Store,
    plans: Sequence[Plan],
    units: Iterable[pa.Table],
    *,
    identity: Callable[[], dict[str, Any]],
    more: Callable[[], dict[str, Any]],
) -> Plan | None:
    """Publish a generation of these units; of several at once, the first wins, and is returned.

    Args:
        store: the dataset's files.
        plans: the generations before.
        units: one table per unit; columns of ITEMS_SCHEMA, and further ones.
        identity: what decides the output, asked for when all units are written.
        more: what plan.json says besides, asked for then.

    Returns:
        None if there are no units: then nothing is published.
    """
    units = iter(units)
    first = next(units, None)
    if first is None:
        return None
    generation, count, rows = len(plans), 0, 0
    with store.draft(layout.items_stem(generation)) as draft:
        with pq.ParquetWriter(draft.file, first.schema, compression="zstd") as writer:
            for table in chain([first], units):
                # One unit is one row group, so that a worker reads its own alone.
                writer.write_table(table.combine_chunks(), row_group_size=len(table))
                count, rows = count + 1, rows + len(table)
        draft.file.seek(0)
        sha256 = hashlib.file_digest(draft.file, "sha256").hexdigest()
        name = layout.items_name(generation, sha256)
        draft.publish(name, sha256)
    ours = identity() | {
        "generation": generation,
        "first_unit": plans[-1].units.stop if plans else 0,
        "units": count,
        "rows": rows,
        "items": {"name": name, "sha256": sha256},
        "fingerprint": fingerprint_of(identity()),
    }
    there = store.create_if_absent(layout.plan_name(generation), canonical(ours | more()))
    return Plan(store=store, generation=generation, description=json.loads(there))


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


def in_units(
    tables: Iterable[pa.Table], rows: int, *, lists: Collection[int], in_place: Collection[int]
) -> Iterator[pa.Table]:
    """The rows in units, one table each. In units that are all URLs, sites take turns.

    Args:
        tables: columns of ITEMS_SCHEMA, and further ones.
        rows: of a unit.
        lists: numbers of the sources whose items have URLs.
        in_place: numbers of the sources that are used in place: their units are of their own rows only.
    """
    with_urls = pa.array(sorted(lists), pa.uint32())

    def owner(table: pa.Table) -> int | None:
        source: int = table["source"][0].as_py()
        return source if source in in_place else None

    for _, group in groupby((table for table in tables if len(table)), key=owner):
        for unit in rechunked(group, rows):
            all_urls = pc.all(pc.is_in(unit["source"], value_set=with_urls)).as_py()
            yield taking_turns(unit) if all_urls else unit
