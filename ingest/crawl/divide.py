"""A crawl by many crawlers: on this machine, on Ray, or as jobs of SLURM.

A plan's units are divided into contiguous parts. Rows are sorted by site, so that a site is asked by one
crawler, which knows how often it may be; only one that a border of parts cuts is asked by two, by one of them
at its end and by the other at its beginning. Parts and workers may be others each time: the dataset is the
same.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from pathlib import Path

from cluster.job import Job, Resources
from cluster.output_trouble import writing
from ingest.crawl.crawl import count_planned, refuse_to_start, seal_plan
from ingest.crawl.part import CRAWL_RANK, Part
from ingest.dataset.commit import read_commits
from ingest.plan.cut_into_units import with_url
from ingest.plan.plan import Plan
from ingest.progress.counts import Counts, CrawlReport, Progress
from ingest.store.open import absolute
from ingest.web.domain import domain_hashes
from ingest.web.settings import FetchSettings

# Of web images of 128 kB, the process that fetches takes 0.9 to 1.2 ms of CPU each, and a worker 2.4 ms to
# check and 4.0 ms to resize it: more workers than this would wait for the one.
WORKERS_PER_CRAWLER = 4

RUN_AGAIN = "run the same command again to go on where it stopped"


def divide(units: Sequence[int], parts: int, site: Callable[[int], Hashable | None]) -> list[Sequence[int]]:
    """Contiguous parts of nearly equal length, not more than asked for.

    Args:
        units: ascending.
        parts: how many.
        site: whose image comes first in a unit; None if nobody is asked. A site that begins several units is
            not cut: its units are of one part.
    """
    parts = min(parts, len(units))
    cuts = [_end_of_site(units, len(units) * part // parts, site) for part in range(1, parts)]
    return [units[first:stop] for first, stop in pairwise(sorted({0, *cuts, len(units)}))]


def _end_of_site(units: Sequence[int], at: int, site: Callable[[int], Hashable | None]) -> int:
    here = site(units[at])
    if here is None or at + 1 == len(units) or site(units[at + 1]) != here:
        return at
    return bisect_left(range(len(units)), True, lo=at + 1, key=lambda each: site(units[each]) != here)


def first_site(plan: Plan, unit: int) -> Hashable | None:
    """The site of a unit's first row; None if it is not fetched."""
    row = plan.table(unit).slice(0, 1)
    if not plan.are_fetched(row)[0].as_py():
        return None
    return int(domain_hashes(with_url(row)["url"])[0])


def units_left(plan: Plan, fetch: FetchSettings, counts: Counts) -> list[int]:
    """The units of a plan that are not committed; the others are counted."""
    refuse_to_start(plan, fetch)
    count_planned(plan, counts)
    return count_committed(plan, plan.units, counts)


def count_committed(plan: Plan, units: Sequence[int], counts: Counts) -> list[int]:
    """Count those of the units that are committed, and return the others."""
    left = []
    for unit, record in read_commits(plan.store, units):
        if record is None:
            left.append(unit)
        else:
            counts.add_committed(record)
    return left


def seal_and_report(plan: Plan, progress: Progress, counts: Counts) -> CrawlReport:
    """What a crawl ends with, once all units are committed."""
    with writing(plan.store.root):
        root = seal_plan(plan)
    progress(counts)
    return CrawlReport(output=plan.store.root, root=root, counts=counts)


def make_parts(plan: Plan, chunks: Sequence[Sequence[int]], fetch: FetchSettings, workers: int) -> list[Part]:
    """Each chunk of units as one crawler gets it."""
    output = absolute(plan.store)
    return [
        Part(output=output, generation=plan.generation, units=units, fetch=fetch, workers=workers)
        for units in chunks
    ]


def crawl_job(name: str, parts: Sequence[Part], folder: Path, *, cpus: int) -> Job:
    """A job with a rank for each part."""
    return Job(
        name=name,
        function=CRAWL_RANK,
        arguments={"parts": [part.to_json() for part in parts], "folder": str(folder)},
        resources=Resources(ranks_per_node=len(parts), cpus_per_rank=cpus),
        folder=folder,
    )
