"""A crawl by many crawlers: on this machine, on Ray, or as jobs of SLURM.

A plan's units are divided into contiguous parts. Rows are sorted by site, so that a site is asked by one
crawler, which knows how often it may be; only one that a border of parts cuts is asked by two, by one of them
at its end and by the other at its beginning. Parts and workers may be others each time: the dataset is the
same.
"""

import hashlib
import logging
import math
import re
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, zip_longest
from pathlib import Path

import pyarrow as pa

from cluster.errors import AlreadyRunning, UserError
from cluster.executors import status_of
from cluster.job import Job, Resources, State
from cluster.local import LocalExecutor
from cluster.run.folder import RunFolder, Status, explain
from cluster.site import Site
from cluster.wording import visible
from ingest.crawl.crawl import crawl_plan, refuse_to_start, seal_plan
from ingest.crawl.part import (
    CRAWL_CALL,
    CRAWL_RANK,
    Part,
    counts_from_json,
    read_report,
    sum_into,
)
from ingest.dataset.commit import read_commits
from ingest.plan.by_domain import domain_hashes
from ingest.plan.plan import Plan
from ingest.progress.counts import Counts, CrawlReport, Progress
from ingest.store.store import absolute
from ingest.web.fetcher import FetchSettings

# Of web images of 128 kB, the process that fetches takes 0.9 to 1.2 ms of CPU each, and a worker 2.4 ms to
# check and 4.0 ms to resize it: more workers than this would wait for the one.
WORKERS_PER_CRAWLER = 4
_POLL_S = 0.2
_POLL_SLURM_S = 2.0
# The smaller a call on Ray is, the more evenly the last ones end; the larger, the more rarely a slow site is
# all that is left of it.
_CALLS_PER_CRAWLER = 8
_UNITS_PER_CALL = 16
_RAY_RETRIES = 20

logger = logging.getLogger(__name__)


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
    if plan.sources[row["source"][0].as_py()]["kind"] != "urls":
        return None
    return int(domain_hashes(row["path"].cast(pa.string()))[0])


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
    if chunks := divide(_begin(plan, fetch, counts), parts, partial(first_site, plan)):
        shared = replace(fetch, connections=math.ceil(fetch.connections / len(chunks)))
        orders = _orders(plan, chunks, shared, math.ceil(workers / len(chunks)))
        # What could not be removed is in the system's folder for such things.
        with tempfile.TemporaryDirectory(prefix="ingest-crawl-", ignore_cleanup_errors=True) as folder:
            _run_here(_job("crawl", orders, Path(folder), cpus=1), progress, counts)
    return _end(plan, progress, counts)


def _run_here(job: Job, progress: Progress, counts: Counts) -> None:
    found, ranks = replace(counts), range(job.resources.ranks)
    handle = LocalExecutor().submit(job)
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
    _raise_unless_completed(RunFolder(job.folder).read_status())


def crawl_on_ray(
    plan: Plan,
    *,
    fetch: FetchSettings,
    workers: int,
    parts: int,
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
        parts: crawlers at a time.
    """
    from cluster.ray.executor import RayExecutor

    left = _begin(plan, fetch, counts)
    pieces = divide(
        left, max(parts * _CALLS_PER_CRAWLER, len(left) // _UNITS_PER_CALL), partial(first_site, plan)
    )
    calls = [part.to_json() for part in _orders(plan, _in_turns(pieces, parts), fetch, workers)]
    executor = RayExecutor(site.ray_address, site=site)
    done = [replace(counts)]
    progress(counts)
    for _, answer in executor.map(CRAWL_CALL, calls, in_flight=parts, retries=_RAY_RETRIES, cpus=workers):
        done.append(counts_from_json(answer))
        sum_into(counts, done)
        progress(counts)
    return _end(plan, progress, counts)


def _in_turns(pieces: Sequence[Sequence[int]], parts: int) -> list[Sequence[int]]:
    """In such an order that those under way lie far apart: a site that a border cuts is in one of them."""
    far = [pieces[len(pieces) * part // parts : len(pieces) * (part + 1) // parts] for part in range(parts)]
    return [piece for turn in zip_longest(*far) for piece in turn if piece is not None]


@dataclass(frozen=True, kw_only=True)
class SlurmPart:
    """A part that SLURM has been given.

    Attributes:
        run: its folder; `submit status`, `logs` and `cancel` know it.
        id: SLURM's number of the job.
        new: it was submitted just now; else it was going on.
    """

    run: RunFolder
    id: str
    new: bool


def submit_to_slurm(
    plan: Plan, *, fetch: FetchSettings, workers: int, parts: int, site: Site, runs: Path, counts: Counts
) -> list[SlurmPart]:
    """Submit one job for each part with units left, unless it is going on. Whichever ends last, seals.

    Each is started again by SLURM when it is preempted, out of time, or has lost its node.

    Args:
        plan: in a store that all nodes reach by the same name, as they must reach the sources.
        fetch, workers, parts: as for `crawl_on_ray`.
        site: the cluster's facts.
        runs: where the jobs' folders are made.
        counts: gets what the parts that need no job have made.

    Raises:
        UserError: SLURM refuses; or the same crawl is going on in another number of parts.
    """
    from cluster.slurm.executor import SlurmExecutor, SlurmHandle

    left = set(_begin(plan, fetch, Counts()))
    counts.units, counts.planned = len(plan.units), plan.rows
    chunks = divide(plan.units, parts, partial(first_site, plan))
    stem = _run_name(plan)
    names = [f"{stem}-{number + 1}-of-{len(chunks)}" for number in range(len(chunks))]
    _refuse_other_parts(runs, stem, names)
    submitted = []
    for name, part in zip(names, _orders(plan, chunks, fetch, workers), strict=True):
        if left.isdisjoint(part.units):
            _count_committed(plan, part.units, counts)
            continue
        run = RunFolder((runs / name).absolute())
        try:
            handle = SlurmExecutor(site).submit(_job(name, [part], run.path, cpus=workers))
        except AlreadyRunning:
            submitted.append(SlurmPart(run=run, id=SlurmHandle(run).id, new=False))
        else:
            submitted.append(SlurmPart(run=run, id=handle.id, new=True))
    return submitted


def wait_for_slurm(
    plan: Plan, submitted: Sequence[SlurmPart], *, progress: Progress, counts: Counts
) -> CrawlReport:
    """Wait until all parts have ended; the jobs do not need it.

    Raises:
        UserError: a part did not complete.
    """
    found = replace(counts)
    going = True
    while going:
        states = [status_of(part.run).state for part in submitted]
        going = not all(state.ended for state in states)
        sum_into(counts, [found, *(read_report(part.run.path, 0) for part in submitted)])
        progress(counts)
        if going:
            time.sleep(_POLL_SLURM_S)
    for part in submitted:
        _raise_unless_completed(status_of(part.run))
    return _end(plan, progress, counts)


def _begin(plan: Plan, fetch: FetchSettings, counts: Counts) -> list[int]:
    """The units left; the others are counted."""
    refuse_to_start(plan, fetch)
    counts.units, counts.planned = len(plan.units), plan.rows
    return _count_committed(plan, plan.units, counts)


def _count_committed(plan: Plan, units: Sequence[int], counts: Counts) -> list[int]:
    """Count those of the units that are committed, and return the others."""
    left = []
    for unit, record in read_commits(plan.store, units):
        if record is None:
            left.append(unit)
        else:
            counts.add_committed(record)
    return left


def _end(plan: Plan, progress: Progress, counts: Counts) -> CrawlReport:
    root = seal_plan(plan)
    progress(counts)
    return CrawlReport(output=plan.store.root, root=root, counts=counts)


def _orders(plan: Plan, chunks: Sequence[Sequence[int]], fetch: FetchSettings, workers: int) -> list[Part]:
    output = absolute(plan.store)
    return [
        Part(output=output, generation=plan.generation, units=units, fetch=fetch, workers=workers)
        for units in chunks
    ]


def _job(name: str, orders: Sequence[Part], folder: Path, *, cpus: int) -> Job:
    return Job(
        name=name,
        function=CRAWL_RANK,
        arguments={"parts": [part.to_json() for part in orders], "folder": str(folder)},
        resources=Resources(ranks_per_node=len(orders), cpus_per_rank=cpus),
        folder=folder,
    )


def _run_name(plan: Plan) -> str:
    """Of the jobs of this plan in this output: the same each time, and nobody else's."""
    text = absolute(plan.store)
    digest = hashlib.sha256(f"{text}\n{plan.fingerprint}".encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text.rstrip("/").rpartition("/")[2])
    return f"crawl-{name}-{digest}"


def _refuse_other_parts(runs: Path, stem: str, names: Sequence[str]) -> None:
    """Two divisions of one plan at a time would make every unit twice, for nothing."""
    for path in sorted(runs.glob(f"{stem}-*/status.json")):
        if path.parent.name not in names and not (status := status_of(RunFolder(path.parent))).state.ended:
            raise UserError(
                f"this crawl is going on in other parts: {path.parent} is {status.state}; give the number of "
                "parts that it was started with, or end those with `submit cancel` first"
            )


def _raise_unless_completed(status: Status) -> None:
    if status.state is State.COMPLETED:
        return
    failure = status.failure
    if failure is None:
        raise UserError(explain(status))
    if failure.user_error:
        raise UserError(failure.message)
    for line in failure.log_tail:
        logger.error("    %s", visible(line))
    who = status.name
    if status.ranks > 1 and failure.rank is not None:
        who = f"crawler {failure.rank + 1} of {status.ranks}"
    where = f" on {failure.node}" if failure.node is not None and status.executor != "local" else ""
    raise UserError(
        f"{who} died{where}: {failure.type}: {failure.message}; run the same command again to go on where it "
        "stopped"
    )
