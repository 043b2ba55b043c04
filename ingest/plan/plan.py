"""The plan of a generation: immutable units of work, and everything that decides what they give.

It is two files: `plan/{g}/units-{sha16}.parquet`, published first, and the `plan.json` that names it, created
last if there is none.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest.dataset import layout
from ingest.dataset.open import is_damage
from ingest.dataset.plan_record import Identity, ItemsRecord, PlanRecord, SourceRecord, read_plan
from ingest.dataset.schema import ITEMS_SCHEMA, SPAN_COLUMNS, VIDEO_SCHEMA
from ingest.labels.labelled import COLUMNS as LABEL_COLUMNS
from ingest.plan.settings import CrawlSettings
from ingest.sources.companions import COLUMNS
from ingest.sources.source import Item
from ingest.store.store import Store

# Columns that a plan has, and rows only if somebody says something.
_SELDOM = [*COLUMNS, *LABEL_COLUMNS]
_OBJECTS = 256


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A frozen generation of units.

    Attributes:
        store: the dataset's files.
        record: what plan.json says.
    """

    store: Store
    record: PlanRecord

    @property
    def generation(self) -> int:
        """Its number; the first is 0."""
        return self.record.generation

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides the output, hex."""
        return self.record.fingerprint

    @property
    def units(self) -> range:
        """Unit numbers, which go on from the generation before."""
        return range(self.record.first_unit, self.record.first_unit + self.record.units)

    @cached_property
    def lanes(self) -> list[range]:
        """Those with URLs, which are the last ones, by lanes: a crawler makes whole ones."""
        lengths = self.record.lanes
        if lengths is None:  # of an earlier version
            lengths = (len(self.units),) if any(source.kind.is_fetched for source in self.sources) else ()
        stops = [*accumulate(lengths, initial=self.units.stop - sum(lengths))]
        return [range(start, stop) for start, stop in pairwise(stops)]

    @cached_property
    def local_units(self) -> range:
        """Those without URLs."""
        lanes = self.lanes
        return range(self.units.start, lanes[0].start if lanes else self.units.stop)

    @property
    def rows(self) -> int:
        """Attempts planned, over all units."""
        return self.record.rows

    @property
    def sources(self) -> tuple[SourceRecord, ...]:
        """What each source is, by its number."""
        return self.record.sources

    @property
    def locations(self) -> tuple[str, ...]:
        """Where each source was when it was planned."""
        return self.record.locations

    @cached_property
    def settings(self) -> CrawlSettings:
        """What is made of the sources."""
        return CrawlSettings.from_flags(self.record.settings)

    def table(self, unit: int) -> pa.Table:
        """The unit's attempts in order; columns of ITEMS_SCHEMA, and further ones."""
        with self._listing(self._metadata) as parquet:
            return parquet.read_row_group(unit - self.units.start, use_threads=False)

    def rows_of(self, unit: int) -> int:
        """How many attempts a unit has."""
        rows: int = self._metadata.row_group(unit - self.units.start).num_rows
        return rows

    def columns_of_units(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns, as far as there are such, of each unit in turn."""
        there = [name for name in columns if name in self.columns().names]
        with self._listing(self._metadata) as parquet:
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns=there, use_threads=False)

    def are_fetched(self, table: pa.Table) -> pa.Array:
        """Whether each row of such a table is a URL to fetch."""
        kinds = pa.array([source.kind.is_fetched for source in self.sources])
        return kinds.take(table["source"].combine_chunks())

    def columns(self) -> pa.Schema:
        """The columns of `table`."""
        return self._metadata.schema.to_arrow_schema().remove_metadata()

    def extra_columns(self) -> pa.Schema:
        """Those that rows of this generation have besides everyone's.

        Most tars have no companions, and most labels no splits: columns for these count only if there is
        something in them.
        """
        own = {*ITEMS_SCHEMA.names, *SPAN_COLUMNS.names}
        further = [field for field in self.columns() if field.name not in own]
        found = [field for field in further if field not in _SELDOM or self._has_values(field.name)]
        return pa.schema([*found, *(VIDEO_SCHEMA if self.settings.video is not None else ())])

    def has_labels(self) -> bool:
        """Whether any row has one, or has one to be ignored."""
        return any(self._has_values(name) for name in ("labels", "ignore") if name in self.columns().names)

    def _has_values(self, column: str) -> bool:
        metadata = self._metadata
        # That of a list is called labels.list.element.
        paths = [
            metadata.schema.column(place).path.partition(".")[0] for place in range(metadata.num_columns)
        ]
        groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
        # An empty list counts as one null.
        return any(
            group.column(paths.index(column)).statistics.null_count
            < group.column(paths.index(column)).num_values
            for group in groups
        )

    @cached_property
    def _metadata(self) -> pq.FileMetaData:
        # Of the size of the plan: it is read once, not for every unit.
        with self._listing() as parquet:
            return parquet.metadata

    @contextmanager
    def _listing(self, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
        name = self.record.items.name
        try:
            with self.store.open(name) as file, pq.ParquetFile(file, metadata=metadata) as parquet:
                yield parquet
        except (OSError, pa.ArrowException) as error:
            if not isinstance(error, FileNotFoundError) and not is_damage(error):
                raise
            record = self.store.where(layout.plan_name(self.generation))
            raise UserError(
                f"{self.store.where(name)} is damaged or gone: restore it from a copy, or remove {record} "
                "and give the command that planned it again, with the same sources and options"
            ) from error


def items_of(table: pa.Table) -> Iterator[tuple[int, Item]]:
    """The attempts of a unit's table in order: the source's number, and the item; few at a time."""
    for batch in table.to_batches(max_chunksize=_OBJECTS):
        for row in batch.to_pylist():
            source = row.pop("source")
            values = {name: row.pop(name) for name in ITEMS_SCHEMA.names[1:]}
            yield source, Item(**values | {"labels": tuple(values["labels"])}, extra=row)


def read_plans(store: Store) -> list[Plan]:
    """The generations of a dataset, ascending; none if nothing was planned there.

    Raises:
        UserError: the record of one is damaged.
    """
    plans: list[Plan] = []
    while (record := read_plan(store, len(plans))) is not None:
        plans.append(Plan(store=store, record=record))
    return plans


def fingerprint_of(identity: Identity) -> str:
    return hashlib.sha256(identity.to_bytes()).hexdigest()


def publish_plan(
    store: Store,
    plans: Sequence[Plan],
    units: Iterable[pa.Table],
    *,
    identity: Callable[[], Identity],
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
    decides = identity()
    ours = PlanRecord(
        **decides.plain(),
        generation=generation,
        first_unit=plans[-1].units.stop if plans else 0,
        units=count,
        rows=rows,
        items=ItemsRecord(name=name, sha256=sha256),
        fingerprint=fingerprint_of(decides),
        **more(),
    )
    store.create_if_absent(layout.plan_name(generation), ours.to_bytes())
    winner = read_plan(store, generation)
    assert winner is not None
    return Plan(store=store, record=winner)
