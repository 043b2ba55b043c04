"""The parts of a crawl on a Ray cluster."""

from dataclasses import replace

from cluster.site import Site
from ingest.crawl.divide import divide, make_parts, seal_and_report, together, units_left
from ingest.crawl.part import CRAWL_CALL, counts_from_json, sum_into
from ingest.plan.plan import Plan
from ingest.progress.counts import Counts, CrawlReport, Progress
from ingest.web.settings import FetchSettings

# The smaller a call on Ray is, the more evenly the last ones end; the larger, the more lanes go on where the
# slowest sites of some hold these up.
_CALLS_PER_CRAWLER = 4
_LANES_PER_CALL = 32


def crawl_on_ray(
    plan: Plan,
    *,
    fetch: FetchSettings,
    workers: int,
    crawlers: int,
    site: Site,
    progress: Progress,
    counts: Counts,
) -> CrawlReport:
    """Crawl on a Ray cluster: the site's, RAY_ADDRESS's, a SLURM allocation's, or one started here.

    Each call is a few units; one whose worker or node is lost is made again, but for what it has committed.
    All nodes must reach the sources and the output by the same names.

    Args:
        plan, progress, counts: see `crawl_plan`.
        fetch: its `connections` are of each crawler.
        workers: checking processes of each crawler, and the cores that it takes.
        crawlers: at a time; each call is a part of its own.
    """
    from cluster.ray.executor import RayExecutor

    pieces = together(plan, units_left(plan, fetch, counts))
    chunks = divide(pieces, max(crawlers * _CALLS_PER_CRAWLER, len(pieces) // _LANES_PER_CALL))
    calls = [part.to_json() for part in make_parts(plan, chunks, fetch, workers)]
    executor = RayExecutor(site.ray_address, site=site)
    done = [replace(counts)]
    progress(counts)
    for _, answer in executor.map(CRAWL_CALL, calls, in_flight=crawlers, cpus=workers):
        done.append(counts_from_json(answer))
        sum_into(counts, done)
        progress(counts)
    return seal_and_report(plan, progress, counts)
