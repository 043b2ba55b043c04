"""Sources become a plan, frozen with everything that decides the output.

Whoever comes to the same output later describes the same sources again and compares: the same inputs,
settings and builds go on with the plan that is there, anything else is refused in one sentence.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any

import pyarrow as pa

from cluster.errors import UserError
from cluster.wording import several
from ingest.dataset.plan_record import SourceRecord
from ingest.dataset.schema import ITEMS_SCHEMA
from ingest.plan.by_lane import ByLane
from ingest.plan.cut_into_units import filled, in_lanes, in_units, with_url
from ingest.plan.listed_before import ListedBefore
from ingest.plan.plan import Plan, fingerprint_of, publish_plan, read_plans
from ingest.plan.planned_before import PlannedBefore
from ingest.plan.settings import CrawlSettings, difference, identity_of
from ingest.sources.source import Found, Listing
from ingest.store.store import Store


def freeze(
    store: Store,
    sources: Sequence[Listing],
    settings: CrawlSettings,
    *,
    listed: Callable[[int], None],
    extend: bool = False,
    locations: Sequence[str] = (),
    more: Callable[[], dict[str, Any]] = dict,
) -> Plan:
    """The plan of this work: made now, or the one that is there.

    Args:
        store: the dataset's files.
        sources: where images come from, in order.
        settings: what is made of them.
        listed: called now and then with the number of items listed so far.
        extend: if other work was planned here, add a generation; what was planned before is left out.
        locations: of the sources, so that others can open them.
        more: what plan.json says besides, asked for when all rows are known.

    Raises:
        UserError: there is nothing to ingest, or the output was planned for other work.
    """
    plans = read_plans(store)
    listed_before = ListedBefore(store, locations)
    if plans:
        known = [listed_before.found(location) for location in locations]
        found = _described(sources, listed, known)
        there = _already_planned(plans, found, settings)
        if there is None and any(known):  # it was listed last with other settings
            found = _described(sources, listed, ())
            there = _already_planned(plans, found, settings)
        if there is not None:
            listed_before.remember(locations, found)
            return there
        if not extend:
            ours = identity_of(settings, found, extends=())
            add = ""
            if plans[0].sources != tuple(found):
                others = _others(plans[0].sources, found)
                add = "; --extend adds to it" if others else "; --extend adds what is new"
            raise UserError(
                f"{store.root} was planned {difference(plans[0].record, ours)}, or another --output{add}"
            )
    described: list[SourceRecord] = []
    extends = [plan.fingerprint for plan in plans]
    lanes: list[int] = []
    with ByLane(per_site=settings.per_site) as urls:
        before = PlannedBefore(plans, sources, locations)
        tables = _tables(sources, described, urls, before, listed)
        kinds = [source.kind for source in sources]
        plan = publish_plan(
            store,
            plans,
            chain(
                in_units(tables, settings.unit_rows, kinds=kinds), in_lanes(urls, settings.unit_rows, lanes)
            ),
            identity=lambda: identity_of(settings, described, extends=extends),
            more=lambda: {
                "lanes": tuple(lanes),
                "repeated": urls.repeated,
                "known": urls.known + before.found,
                "over_per_site": urls.over_per_site or None,
                "locations": tuple(locations),
                "contact": settings.fetch.contact,
                **more(),
            },
        )
    if plan is None:
        wanted = "nothing new" if plans else "nothing to ingest"
        full = f": {several(urls.over_per_site, 'row')} left out, as their site has enough (--per-site)"
        raise UserError(
            f"there is {wanted} in {', '.join(source.name for source in sources)}"
            + (full if urls.over_per_site else "")
        )
    identity = identity_of(settings, described, extends=extends)
    if plan.fingerprint != fingerprint_of(identity):  # somebody else was faster, with other work
        raise UserError(f"{store.root} was planned {difference(plan.record, identity)}, or another --output")
    listed_before.remember(locations, described)
    return plan


def _others(before: Sequence[SourceRecord], now: Sequence[SourceRecord]) -> bool:
    return [source.name for source in before] != [source.name for source in now]


def _already_planned(
    plans: Sequence[Plan], described: Sequence[SourceRecord], settings: CrawlSettings
) -> Plan | None:
    for number, plan in enumerate(plans):
        extends = [earlier.fingerprint for earlier in plans[:number]]
        if plan.fingerprint == fingerprint_of(identity_of(settings, described, extends=extends)):
            return plan
    return None


def _described(
    sources: Sequence[Listing], listed: Callable[[int], None], known: Sequence[Found | None]
) -> list[SourceRecord]:
    count = 0

    def more(items: int) -> None:
        nonlocal count
        count += items
        listed(count)

    return [source.describe(more, found) for source, found in zip_longest(sources, known)]


def _tables(
    sources: Sequence[Listing],
    described: list[SourceRecord],
    urls: ByLane,
    before: PlannedBefore,
    listed: Callable[[int], None],
) -> Iterator[pa.Table]:
    """Rows of all sources; those with URLs go to `urls`, and `described` is filled, on the way."""
    schema, count = _joint_schema(sources), 0
    for number, source in enumerate(sources):
        for rows in source.rows():
            numbered = rows.append_column("source", pa.array([number] * len(rows), pa.uint32()))
            table = filled(numbered, schema, name=source.name)
            if source.kind.is_fetched:
                urls.add(with_url(table))
            else:
                yield (table := before.left_out(number, table))
            listed(count := count + len(table))
        described.append(source.describe(lambda items: None))
    if any(source.kind.is_fetched for source in sources):
        for plan in before.plans:
            for table in url_tables(plan):
                urls.add_known(with_url(table)["url"])


def url_tables(plan: Plan) -> Iterator[pa.Table]:
    """The rows of a plan that have URLs."""
    for unit in plan.units:
        table = plan.table(unit)
        yield table.filter(plan.are_fetched(table))


def _joint_schema(sources: Sequence[Listing]) -> pa.Schema:
    """Everyone's columns, and those of all sources."""
    try:
        extras = [source.extra for source in sources]
        return pa.unify_schemas([ITEMS_SCHEMA, *extras], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"the sources have columns of one name and different types: {error}") from error
