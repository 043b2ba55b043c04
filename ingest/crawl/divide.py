"""A crawl by many crawlers: on this machine, on Ray, or as jobs of SLURM.

A part is some of a plan's lanes, whole ones: all of a site is in one lane, and so it is asked by one crawler,
which knows how often it may be. Parts and workers may be others each time: the dataset is the same.
"""

import logging
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path

from cluster.job import Job, Resources
from cluster.output_trouble import writing
from cluster.wording import several
from ingest.crawl.crawl import count_planned, refuse_to_start, seal_plan
from ingest.crawl.part import CRAWL_RANK, Part
from ingest.dataset.commit import read_commits
from ingest.plan.plan import Plan
from ingest.progress.counts import Counts, CrawlReport, Progress
from ingest.store.open import absolute
from ingest.web.settings import FetchSettings

# Of web images of 128 kB, the process that fetches takes 0.9 to 1.2 ms of CPU each, and a worker 2.4 ms to
# check and 4.0 ms to resize it: more workers than this would wait for the one.
WORKERS_PER_CRAWLER = 4

logger = logging.getLogger(__name__)

RUN_AGAIN = "run the same command again to go on where it stopped"


def in_parts(plan: Plan, units: Iterable[int], parts: int) -> list[list[int]]:
    """Those of a plan's units in so many parts, or as few as there are lanes: which is said."""
    made = divide(together(plan, units), parts)
    if made and len(made) < parts:
        logger.info(
            "%s, not %d: no more lanes, or units without URLs, are there", several(len(made), "part"), parts
        )
    return made


def divide(pieces: Sequence[Sequence[int]], parts: int) -> list[list[int]]:
    """As many parts as asked for, or as there are pieces: nearly equally long, of whole pieces that follow
    each other.

    Args:
        pieces: units that one crawler makes; none is empty.
        parts: how many.
    """
    parts = min(parts, len(pieces))
    if parts == 0:
        return []
    # What is longer than a part keeps a crawler busy by itself: the others are divided as if it were one.
    most = -(-sum(map(len, pieces)) // parts)
    stops = [0, *accumulate(min(len(piece), most) for piece in pieces)]
    cuts = [0]
    for part in range(1, parts + 1):
        nearest = _nearest(stops, stops[-1] * part / parts)
        cuts.append(min(max(nearest, cuts[-1] + 1), len(pieces) - parts + part))
    return [list(chain.from_iterable(pieces[first:stop])) for first, stop in pairwise(cuts)]


def _nearest(values: Sequence[int], to: float) -> int:
    """The place of the value, of ascending ones, that is nearest."""
    after = bisect_left(values, to)
    return min(range(max(after - 1, 0), min(after + 1, len(values))), key=lambda at: abs(values[at] - to))


def together(plan: Plan, units: Iterable[int]) -> list[list[int]]:
    """The units among these that one crawler makes: by lanes, and those without URLs each by itself."""
    left = set(units)
    alone = [[unit] for unit in plan.local_units if unit in left]
    lanes = ([unit for unit in lane if unit in left] for lane in plan.lanes)
    return [*alone, *filter(None, lanes)]


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
