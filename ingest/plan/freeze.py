"""Sources become a plan, frozen with everything that decides the output.

Whoever comes to the same output later describes the same sources again and compares: the same inputs,
settings and builds go on with the plan that is there, anything else is refused in one sentence.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from cluster.errors import UserError
from ingest.dataset.commit import canonical
from ingest.dataset.schema import ITEMS_SCHEMA
from ingest.plan.by_domain import ByDomain
from ingest.plan.cut_into_units import filled, in_units
from ingest.plan.plan import Plan, fingerprint_of, publish_plan, read_plans
from ingest.plan.settings import CrawlSettings, difference, made_with
from ingest.sources.source import Item, Source, first_folder
from ingest.sources.tar_in_place import ForeignTar
from ingest.sources.url_list import UrlList
from ingest.store.store import Store

_BATCH = 1_024
# A stranger's item may have a name of 1 MB, and 128 KB of a companion's text.
_BATCH_CHARACTERS = 8 << 20


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
            for batch in _batches(about.items()):
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
        for batch in _batches(about.items()):
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


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """The items in lists that end after _BATCH items, or earlier, when their texts are very long."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        texts = (item.path, item.caption or "", *item.extra.values(), *item.labels)
        size += sum(map(len, texts))
        if len(batch) == _BATCH or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
