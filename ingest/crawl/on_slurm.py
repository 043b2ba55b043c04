"""The parts of a crawl as SLURM jobs."""

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cluster.errors import AlreadyRunning, UserError
from cluster.executors import settled, status_of
from cluster.run.folder import RunFolder
from cluster.run.status import raise_unless_completed
from cluster.site import Site
from cluster.submit import submit
from ingest.crawl.crawl import count_planned
from ingest.crawl.divide import (
    RUN_AGAIN,
    count_committed,
    crawl_job,
    divide,
    first_site,
    make_parts,
    seal_and_report,
    units_left,
)
from ingest.crawl.part import read_report, sum_into
from ingest.plan.plan import Plan
from ingest.progress.counts import Counts, CrawlReport, Progress
from ingest.store.open import absolute
from ingest.web.settings import FetchSettings

_POLL_SLURM_S = 2.0


@dataclass(frozen=True, kw_only=True)
class PartJob:
    """The job of a part.

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
) -> list[PartJob]:
    """Submit one job for each part with units left, unless it is going on. Whichever ends last, seals.

    Each is started again by SLURM when it is preempted, out of time, or has lost its node.

    Args:
        plan: in a store that all nodes reach by the same name, as they must reach the sources.
        fetch, workers: as for `crawl_on_ray`.
        parts: jobs, a crawler each.
        site: the cluster's facts.
        runs: where the jobs' folders are made.
        counts: gets what the parts that need no job have made.

    Raises:
        UserError: SLURM refuses; or the same crawl is going on in another number of parts.
    """
    from cluster.slurm.executor import SlurmExecutor, SlurmHandle

    left = set(units_left(plan, fetch, Counts()))
    count_planned(plan, counts)
    chunks = divide(plan.units, parts, partial(first_site, plan))
    stem = _run_name(plan)
    names = [f"{stem}-{number + 1}-of-{len(chunks)}" for number in range(len(chunks))]
    _refuse_other_parts(runs, stem, names)
    submitted = []
    for name, part in zip(names, make_parts(plan, chunks, fetch, workers), strict=True):
        if left.isdisjoint(part.units):
            count_committed(plan, part.units, counts)
            continue
        run = RunFolder((runs / name).absolute())
        try:
            handle = submit(crawl_job(name, [part], run.path, cpus=workers), SlurmExecutor(site))
        except AlreadyRunning:
            submitted.append(PartJob(run=run, id=SlurmHandle(run).id, new=False))
        else:
            submitted.append(PartJob(run=run, id=handle.id, new=True))
    return submitted


def wait_for_slurm(
    plan: Plan, submitted: Sequence[PartJob], *, progress: Progress, counts: Counts
) -> CrawlReport:
    """Wait until all parts have ended; the jobs do not need it.

    Raises:
        UserError: a part did not complete.
    """
    found = replace(counts)
    going = True
    while going:
        states = [settled(job.run).state for job in submitted]
        going = not all(state.ended for state in states)
        sum_into(counts, [found, *(read_report(job.run.path, 0) for job in submitted)])
        progress(counts)
        if going:
            time.sleep(_POLL_SLURM_S)
    for job in submitted:
        raise_unless_completed(status_of(job.run), remedy=RUN_AGAIN)
    return seal_and_report(plan, progress, counts)


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
