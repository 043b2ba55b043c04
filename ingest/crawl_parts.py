"""A crawl by many crawlers: on this machine, on Ray, or as jobs of SLURM.

A plan's units are divided into contiguous parts. Rows are sorted by site, so that a site is asked by one
crawler, which knows how often it may be: by two, if the border of parts lies in it, and by more only if it
has more rows than a part. Parts and workers may be others each time: the dataset is the same.
"""

import hashlib
import logging
import math
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from cluster.errors import AlreadyRunning, UserError
from cluster.executors import status_of
from cluster.job import Job, Resources, State
from cluster.local import LocalExecutor
from cluster.runs import RunFolder, Status, explain
from cluster.site import Site
from ingest.commit import read_commits
from ingest.crawl import Counts, CrawlReport, Progress, crawl_plan, refuse_to_start, seal_plan
from ingest.crawl_part import (
    CRAWL_CALL,
    CRAWL_RANK,
    Part,
    counts_from_json,
    read_report,
    sum_into,
)
from ingest.fetch import FetchSettings
from ingest.plan import Plan
from ingest.wording import visible

# One event loop fetches about as many images as this many processes check: see benchmarks/RESULTS.md.
WORKERS_PER_CRAWLER = 8
_POLL_S = 0.2
_POLL_SLURM_S = 2.0
# A call on Ray is the smaller, the more evenly the last ones end, and the larger, the less often all of its
# URLs but those of slow sites are fetched.
_CALLS_PER_CRAWLER = 8
_UNITS_PER_CALL = 16
_RAY_RETRIES = 20

logger = logging.getLogger(__name__)


def divide(units: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Contiguous parts of nearly equal length, as many as asked for or as there are units."""
    parts = min(parts, len(units))
    cuts = [len(units) * part // parts for part in range(1, parts)]
    return [units[first:stop] for first, stop in pairwise([0, *cuts, len(units)])] if parts else []


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
    if chunks := divide(_begin(plan, fetch, counts), parts):
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
    from cluster.ray import RayExecutor

    left = _begin(plan, fetch, counts)
    calls = [part.to_json() for part in _orders(plan, list(_in_turns(left, parts)), fetch, workers)]
    executor = RayExecutor(site.ray_address, site=site)
    done = [replace(counts)]
    progress(counts)
    for _, answer in executor.map(CRAWL_CALL, calls, in_flight=parts, retries=_RAY_RETRIES, cpus=workers):
        done.append(counts_from_json(answer))
        sum_into(counts, done)
        progress(counts)
    return _end(plan, progress, counts)


def _in_turns(left: Sequence[int], parts: int) -> Iterator[Sequence[int]]:
    """Small pieces, so ordered that those under way at a time lie far apart, and a site in one of them."""
    pieces = []
    for part in divide(left, parts):
        size = min(_UNITS_PER_CALL, math.ceil(len(part) / _CALLS_PER_CRAWLER))
        pieces.append([part[at : at + size] for at in range(0, len(part), size)])
    for turn in range(max(map(len, pieces), default=0)):
        yield from (piece[turn] for piece in pieces if turn < len(piece))


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
    from cluster.slurm import SlurmExecutor, SlurmHandle

    left = set(_begin(plan, fetch, Counts()))
    counts.units, counts.planned = len(plan.units), plan.rows
    chunks = divide(plan.units, parts)
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
    root = plan.store.root
    output = str(root.resolve()) if isinstance(root, Path) else root
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
    text = str(plan.store.root.resolve()) if isinstance(plan.store.root, Path) else plan.store.root
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
