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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest import layout
from ingest.commit import canonical
from ingest.crawl_settings import FORMAT, CrawlSettings, builds, difference
from ingest.grouping import ByDomain, rechunked
from ingest.sources.folder import FolderSource
from ingest.sources.source import Item, Source
from ingest.sources.tar import TarSource, is_tar
from ingest.sources.urls import Columns, UrlList, list_format
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
_BATCH = 16_384


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

    def extra_columns(self) -> pa.Schema:
        """The columns that rows of this generation have besides everyone's."""
        schema = self._metadata.schema.to_arrow_schema()
        return pa.schema([field for field in schema if field.name not in ITEMS_SCHEMA.names])

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
        UserError: it is neither.
    """
    if list_format(text) is not None and not Path(text).is_dir():
        return UrlList(text, columns)
    return open_images(text)


def open_images(text: str) -> Source:
    """A folder or a local tar.

    Raises:
        UserError: it is neither.
    """
    path = Path(text)
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise UserError(f"source {text} does not exist")
    if path.is_file() and os.access(path, os.R_OK) and is_tar(path):
        return TarSource(path)
    raise UserError(
        f"source {text} is neither a folder, nor a readable tar (plain, gzip, bzip2 or xz), nor named like a "
        "list of URLs (.parquet, .csv, .tsv, .jsonl or .txt, also with .gz or .zst)"
    )


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
        plan = publish_plan(
            store,
            plans,
            rechunked(_counted(_tables(sources, described, urls, known, plans), listed), settings.unit_rows),
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
    if plan.fingerprint != _fingerprint(identity):  # somebody else was faster, with other work
        raise UserError(
            f"{store.root} was planned {difference(plan.description, identity)}, or another --output"
        )
    return plan


def _others(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> bool:
    return [source["name"] for source in before] != [source["name"] for source in now]


def _already_planned(
    plans: Sequence[Plan], described: Sequence[dict[str, Any]], settings: CrawlSettings
) -> Plan | None:
    for plan in plans:
        if plan.fingerprint == _fingerprint(_identity(described, settings, plans[: plan.generation])):
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
    schema = _joint_schema([source for _, source in lists])
    for number, source in enumerate(sources):
        if isinstance(source, UrlList):
            described.append(source.describe())
            for table in source.tables():
                urls.add(_url_items(table, number, schema, source))
        else:
            about = _Listing(source)
            for batch in batched(about.items(), _BATCH):
                yield _filled(_items_table(number, batch), schema)
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
    return {
        "format": FORMAT,
        "settings": settings.flags(),
        "sources": list(described),
        "builds": builds(),
        "extends": [plan.fingerprint for plan in before],
    }


def _fingerprint(identity: dict[str, Any]) -> str:
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
        "fingerprint": _fingerprint(identity()),
    }
    there = store.create_if_absent(layout.plan_name(generation), canonical(ours | more()))
    return Plan(store=store, generation=generation, description=json.loads(there))


def _items_table(source: int, batch: Sequence[Item]) -> pa.Table:
    columns = {name: [getattr(item, name) for item in batch] for name in ITEMS_SCHEMA.names[1:]}
    return pa.table({"source": [source] * len(batch)} | columns, schema=ITEMS_SCHEMA)


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
    whole = _filled(pa.table(columns), schema, name=source.name)
    return whole.append_column("url", table["url"])


def _filled(table: pa.Table, schema: pa.Schema, *, name: str = "") -> pa.Table:
    """The table with all columns of the schema, in its order and types; absent ones are null."""
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    try:
        return pa.table(columns, names=schema.names).cast(schema)
    except pa.ArrowInvalid as error:
        raise UserError(f"the list {name} has a column of several types: {error}") from error


def _joint_schema(lists: Sequence[UrlList]) -> pa.Schema:
    """Everyone's columns, and those of all lists."""
    extras = [
        pa.schema([f for f in source.schema() if f.name not in ("url", "caption", "labels")])
        for source in lists
    ]
    try:
        return pa.unify_schemas([ITEMS_SCHEMA, *extras], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"the lists have columns of one name and different types: {error}") from error


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
