"""The parts of a crawl on this machine."""

import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from cluster.job import Job
from cluster.local import LocalExecutor
from cluster.run.folder import RunFolder
from cluster.run.status import raise_unless_completed
from cluster.submit import submit
from ingest.crawl.crawl import crawl_plan
from ingest.crawl.divide import (
    RUN_AGAIN,
    crawl_job,
    in_parts,
    make_parts,
    seal_and_report,
    units_left,
)
from ingest.crawl.part import read_report, sum_into
from ingest.plan.plan import Plan
from ingest.progress.counts import Counts, CrawlReport, Progress
from ingest.web.settings import FetchSettings

_POLL_S = 0.2


def crawl_here(
    plan: Plan, *, fetch: FetchSettings, workers: int, parts: int, progress: Progress, counts: Counts
) -> CrawlReport:
    """Crawl with several crawlers on this machine, which end with this process.

    Args:
        plan, progress, counts: see `crawl_plan`.
        fetch: its `connections` are of all crawlers together.
        workers: checking processes of all crawlers together; each has at least one.
        parts: crawlers.

    Raises:
        UserError: as `crawl_plan` does; or a crawler has died.
    """
    if parts == 1:
        return crawl_plan(plan, fetch=fetch, workers=workers, progress=progress, counts=counts)
    if chunks := in_parts(plan, units_left(plan, fetch, counts), parts):
        shared = replace(fetch, connections=math.ceil(fetch.connections / len(chunks)))
        orders = make_parts(plan, chunks, shared, math.ceil(workers / len(chunks)))
        # What could not be removed is in the system's folder for such things.
        with tempfile.TemporaryDirectory(prefix="ingest-crawl-", ignore_cleanup_errors=True) as folder:
            _run_here(crawl_job("crawl", orders, Path(folder), cpus=1), progress, counts)
    return seal_and_report(plan, progress, counts)


def _run_here(job: Job, progress: Progress, counts: Counts) -> None:
    found, ranks = replace(counts), range(job.resources.ranks)
    handle = submit(job, LocalExecutor())
    try:
        going = True
        while going:
            going = not handle.state().ended
            sum_into(counts, [found, *(read_report(job.folder, rank) for rank in ranks)])
            progress(counts)
            time.sleep(_POLL_S if going else 0)
    except BaseException:  # Ctrl-C, too: the crawlers do not hear it
        handle.cancel()
        handle.wait()
        raise
    raise_unless_completed(RunFolder(job.folder).read_status(), remedy=RUN_AGAIN)
