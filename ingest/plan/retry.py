"""Another try at what failed and may succeed by now: a new generation of the attempts that say so.

An attempt that was retried counts by its newest row only. So a retry looks at the rows of the newest retry,
and of the generations after it: that one has taken up all the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import UserError
from ingest.dataset.commit import read_commits
from ingest.dataset.open import open_parquet
from ingest.plan.by_lane import ByLane
from ingest.plan.cut_into_units import filled, in_lanes, in_units, with_url
from ingest.plan.plan import Plan, publish_plan, read_plans
from ingest.plan.settings import identity_of
from ingest.store.store import Store


def plan_retry(store: Store, *, deadline: float | None, tries: int | None) -> Plan | None:
    """A generation of all attempts whose row says that they may succeed later.

    Args:
        store: the dataset's files.
        deadline, tries: of URLs, this time; None: as before.

    Returns:
        The unfinished retry that is there already, or a new one; None if there is nothing to retry.

    Raises:
        UserError: nothing was planned here, or another generation is not finished.
    """
    plans = read_plans(store)
    if not plans:
        raise UserError(f"{store.root} is not a dataset: make one with `ingest crawl-shards`")
    for plan in plans:
        if any(record is None for _, record in read_commits(store, plan.units)):
            if plan is plans[-1] and plan.record.retries is not None:
                return plan
            raise UserError(
                f"{store.root} is not finished: first run the crawl of its generation {plan.generation} again"
            )
    newest = max((plan.generation for plan in plans if plan.record.retries is not None), default=0)
    tried = plans[newest:]
    settings = plans[-1].settings
    sources = [source for plan in tried for source in plan.sources]
    fetch = settings.fetch
    fetch = replace(fetch, deadline=deadline or fetch.deadline, tries=tries or fetch.tries)
    settings = replace(settings, fetch=fetch)
    identity = identity_of(settings, sources, extends=[plan.fingerprint for plan in plans])
    identity = identity.model_copy(update={"retries": tuple(plan.generation for plan in tried)})
    kinds, rows = [source.kind for source in sources], settings.unit_rows
    lanes: list[int] = []
    with ByLane() as urls:
        return publish_plan(
            store,
            plans,
            chain(in_units(_retryable(tried, urls), rows, kinds=kinds), in_lanes(urls, rows, lanes)),
            identity=lambda: identity,
            more=lambda: {
                "lanes": tuple(lanes),
                "locations": tuple(place for plan in tried for place in plan.locations),
            },
        )


def _retryable(plans: Sequence[Plan], urls: ByLane) -> Iterator[pa.Table]:
    """The attempts to make again: those without URLs; the others go to `urls`. All have one schema."""
    schema = pa.unify_schemas([plan.columns() for plan in plans], promote_options="permissive")
    first_source = 0
    for plan in plans:
        for unit, record in read_commits(plan.store, plan.units):
            assert record is not None
            with open_parquet(plan.store, record.meta.name) as parquet:
                rows = parquet.read(columns=["retryable"], use_threads=False)
            # A unit's rows are in the order of its plan.
            table = plan.table(unit).filter(rows["retryable"])
            fetched = plan.are_fetched(table)
            shifted = pc.add(table["source"], pa.scalar(first_source, pa.uint32()))
            table = filled(table.set_column(0, "source", shifted), schema)
            if len(local := table.filter(pc.invert(fetched))):
                yield local
            urls.add(with_url(table.filter(fetched)))
        first_source += len(plan.sources)
