"""Sources become immutable units of work, frozen with everything that decides the output.

A plan is one generation of a dataset: `plan/{g}/units-{sha16}.parquet`, published first, and the `plan.json`
that names it, created last if there is none. Whoever comes to the same output later describes the same
sources again and compares: the same inputs, settings and builds go on with it, anything else is refused in
one sentence.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest import layout
from ingest.commit import canonical
from ingest.crawl_settings import CrawlSettings, difference, made_with
from ingest.grouping import ByDomain, rechunked, taking_turns
from ingest.in_place import ForeignTar
from ingest.sources.folder import FolderSource
from ingest.sources.source import Item, Source, first_folder
from ingest.sources.tar import TarSource, is_tar
from ingest.sources.urls import Columns, UrlList, list_format
from ingest.sources.warc import WarcSource, is_warc
from ingest.sources.webdataset import COLUMNS
from ingest.store import Store

T = TypeVar("T")
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
# A row may have 100 KB of a companion's text.
_BATCH = 1_024


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


def open_source(text: str, columns: Columns) -> Source | UrlList:
    """What `open_images` opens, or a list of URLs.

    Raises:
        UserError: it is none of them.
    """
    if list_format(text) is not None and not Path(text).is_dir():
        return UrlList(text, columns)
    return open_images(text)


def open_images(text: str) -> Source:
    """A folder, a tar (a local one, or on S3), or a local WARC.

    Raises:
        UserError: it is none of them.
    """
    if text.startswith("s3://"):
        return _remote_tar(text)
    path = Path(text)
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise UserError(f"source {text} does not exist")
    if path.is_file() and os.access(path, os.R_OK) and is_tar(path):
        return TarSource(path)
    if path.is_file() and os.access(path, os.R_OK) and is_warc(path):
        return WarcSource(path)
    raise UserError(
        f"source {text} is neither a folder, nor a readable tar (plain, gzip, bzip2 or xz), nor a WARC file, "
        "nor named like a list of URLs (.parquet, .csv, .tsv, .jsonl or .txt, also with .gz or .zst)"
    )


def _remote_tar(url: str) -> Source:
    try:
        readable = is_tar(url)
    except FileNotFoundError:
        raise UserError(f"source {url} does not exist") from None
    if not readable:
        raise UserError(
            f"source {url} is no readable tar, and nothing else is read from there but lists of URLs"
        )
    return TarSource(url)


def read_plans(store: Store) -> list[Plan]:
    """The generations of a dataset, ascending; none if nothing was planned there."""
    plans: list[Plan] = []
    while True:
        try:
            description = json.loads(store.read(layout.plan_name(len(plans))))
        except FileNotFoundError:
            return plans
        plans.append(Plan(store=store, generation=len(plans), description=description))


def freeze(
    store: Store,
    sources: Sequence[Source | UrlList],
    settings: CrawlSettings,
    *,
    listed: Callable[[int], None],
    extend: bool = False,
    locations: Sequence[str] = (),
) -> Plan:
    """The plan of this work: made now, or the one that is there.

    Args:
        store: the dataset's files.
        sources: where images come from, in order.
        settings: what is made of them.
        listed: called now and then with the number of items listed so far.
        extend: if other work was planned here, add a generation; URLs planned before are left out.
        locations: of the sources, so that others can open them.

    Raises:
        UserError: there is nothing to ingest, or the output was planned for other work.
    """
    plans = read_plans(store)
    if plans:
        found = _described(sources, listed)
        there = _already_planned(plans, found, settings)
        if there is not None:
            return there
        if not extend:
            ours = _identity(found, settings, [])
            add = "; --extend adds to it" if _others(plans[0].sources, found) else ""
            raise UserError(
                f"{store.root} was planned {difference(plans[0].description, ours)}, or another --output{add}"
            )
    described: list[dict[str, Any]] = []
    with ByDomain() as urls, ByDomain() as known:
        lists = {number for number, source in enumerate(sources) if isinstance(source, UrlList)}
        in_place = {number for number, source in enumerate(sources) if isinstance(source, ForeignTar)}
        tables = _counted(_tables(sources, described, urls, known, plans), listed)
        plan = publish_plan(
            store,
            plans,
            in_units(tables, settings.unit_rows, lists=lists, in_place=in_place),
            identity=lambda: _identity(described, settings, plans),
            more=lambda: {
                "repeated": urls.repeated,
                "known": urls.known,
                "locations": list(locations),
                "contact": settings.fetch.contact,
            },
        )
    if plan is None:
        wanted = "nothing new" if plans else "nothing to ingest"
        raise UserError(f"there is {wanted} in {', '.join(source.name for source in sources)}")
    identity = _identity(described, settings, plans)
    if plan.fingerprint != fingerprint_of(identity):  # somebody else was faster, with other work
        raise UserError(
            f"{store.root} was planned {difference(plan.description, identity)}, or another --output"
        )
    return plan


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


def _others(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> bool:
    return [source["name"] for source in before] != [source["name"] for source in now]


def _already_planned(
    plans: Sequence[Plan], described: Sequence[dict[str, Any]], settings: CrawlSettings
) -> Plan | None:
    for plan in plans:
        if plan.fingerprint == fingerprint_of(_identity(described, settings, plans[: plan.generation])):
            return plan
    return None


def _tables(
    sources: Sequence[Source | UrlList],
    described: list[dict[str, Any]],
    urls: ByDomain,
    known: ByDomain,
    plans: Sequence[Plan],
) -> Iterator[pa.Table]:
    """Rows of all sources, those with URLs last; `described` is filled on the way."""
    lists = [(number, source) for number, source in enumerate(sources) if isinstance(source, UrlList)]
    schema = _joint_schema(sources)
    for number, source in enumerate(sources):
        if isinstance(source, UrlList):
            described.append(source.describe())
            for table in source.tables():
                urls.add(_url_items(table, number, schema, source))
        else:
            about = _Listing(source)
            for batch in batched(about.items(), _BATCH):
                yield filled(_items_table(number, batch, source.extra), schema)
            described.append(about.describe())
    if lists:
        for plan in plans:
            for table in url_tables(plan):
                known.add(pa.table({"url": table["path"].cast(pa.string())}))
        for table in urls.tables(known):
            yield table.drop_columns("url")


def url_tables(plan: Plan) -> Iterator[pa.Table]:
    """The rows of a plan that have URLs."""
    kinds = pa.array([source["kind"] == "urls" for source in plan.sources])
    for unit in plan.units:
        table = plan.table(unit)
        yield table.filter(kinds.take(table["source"].combine_chunks()))


class _Listing:
    """The items of a source, and what they were, once all have been listed."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._digest = hashlib.sha256()
        self._count = 0

    def items(self) -> Iterator[Item]:
        for item in self._source.items():
            self._digest.update(
                struct.pack("<IQQI", len(item.path), item.offset, item.size, len(item.problem))
                + item.path
                + item.problem.encode()
            )
            if item.caption is not None or item.extra or item.labels != first_folder(item.path):
                # What a companion says, which is no part of the item's own bytes.
                self._digest.update(canonical([item.caption, item.labels, dict(item.extra)]))
            self._count += 1
            yield item

    def describe(self) -> dict[str, Any]:
        return self._source.describe() | {"items": self._count, "sha256": self._digest.hexdigest()}


def _described(sources: Sequence[Source | UrlList], listed: Callable[[int], None]) -> list[dict[str, Any]]:
    described = []
    count = 0
    for source in sources:
        if isinstance(source, UrlList):
            described.append(source.describe())
            continue
        about = _Listing(source)
        for batch in batched(about.items(), _BATCH):
            count += len(batch)
            listed(count)
        described.append(about.describe())
    return described


def _identity(
    described: Sequence[dict[str, Any]], settings: CrawlSettings, before: Sequence[Plan]
) -> dict[str, Any]:
    """Everything that decides the output."""
    extends = [plan.fingerprint for plan in before]
    return made_with(settings) | {"sources": list(described), "extends": extends}


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


def _items_table(source: int, batch: Sequence[Item], extra: pa.Schema) -> pa.Table:
    columns = {name: [getattr(item, name) for item in batch] for name in ITEMS_SCHEMA.names[1:]}
    further = {name: [item.extra.get(name) for item in batch] for name in extra.names}
    return pa.table(
        {"source": [source] * len(batch)} | columns | further, schema=pa.schema([*ITEMS_SCHEMA, *extra])
    )


def _url_items(table: pa.Table, number: int, schema: pa.Schema, source: UrlList) -> pa.Table:
    rows = len(table)
    columns = {
        "source": pa.array([number] * rows, pa.uint32()),
        "path": table["url"].cast(pa.binary()),
        "offset": pa.array([0] * rows, pa.uint64()),
        "size": pa.array([0] * rows, pa.uint64()),
        "problem": pa.array([""] * rows, pa.string()),
        **{name: table[name] for name in table.column_names if name != "url"},
    }
    whole = filled(pa.table(columns), schema, name=source.name)
    return whole.append_column("url", table["url"])


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


def _joint_schema(sources: Sequence[Source | UrlList]) -> pa.Schema:
    """Everyone's columns, and those of all sources."""
    own = ("url", "caption", "labels")
    extras = [
        pa.schema([field for field in source.schema() if field.name not in own])
        if isinstance(source, UrlList)
        else source.extra
        for source in sources
    ]
    try:
        return pa.unify_schemas([ITEMS_SCHEMA, *extras], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"the sources have columns of one name and different types: {error}") from error


def _counted(tables: Iterable[pa.Table], listed: Callable[[int], None]) -> Iterator[pa.Table]:
    count = 0
    for table in tables:
        count += len(table)
        listed(count)
        yield table


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter. (itertools.batched came with Python 3.12.)"""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
