"""The parts of a crawl as SLURM jobs."""

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cluster.errors import UserError
from cluster.executors import Look, status_of
from cluster.parts import Submitted, runs_of_parts, submit_parts
from cluster.run.folder import RunFolder
from cluster.run.status import raise_unless_completed
from cluster.site import Site
from cluster.slurm.executor import SlurmExecutor
from cluster.slurm.status import settled_statuses
from ingest.crawl.crawl import count_planned
from ingest.crawl.divide import (
    RUN_AGAIN,
    count_committed,
    crawl_job,
    in_parts,
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


def submit_to_slurm(
    plan: Plan, *, fetch: FetchSettings, workers: int, parts: int, site: Site, runs: Path, counts: Counts
) -> Submitted:
    """Submit one job for each part with units left, unless it is going on, all of them as an array. Whichever
    ends last, seals.

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
    left = set(units_left(plan, fetch, Counts()))
    count_planned(plan, counts)
    chunks = in_parts(plan, plan.units, parts)
    stem = _run_name(plan)
    places = runs_of_parts(runs / stem, len(chunks))
    _refuse_other_parts(runs / stem, places)
    jobs = []
    for place, part in zip(places, make_parts(plan, chunks, fetch, workers), strict=True):
        if left.isdisjoint(part.units):
            count_committed(plan, part.units, counts)
        else:
            jobs.append(crawl_job(f"{stem}-{place.name}", [part], place, cpus=workers))
    return submit_parts(jobs, SlurmExecutor(site)) if jobs else Submitted(parts=())


def wait_for_slurm(
    plan: Plan, runs: Sequence[RunFolder], *, progress: Progress, counts: Counts
) -> CrawlReport:
    """Wait until all parts have ended; the jobs do not need it.

    Raises:
        UserError: a part did not complete.
    """
    found = replace(counts)
    going = True
    while going:
        going = not all(status.state.ended for status in settled_statuses(runs))
        sum_into(counts, [found, *(read_report(run.path, 0) for run in runs)])
        progress(counts)
        if going:
            time.sleep(_POLL_SLURM_S)
    for run in runs:
        raise_unless_completed(status_of(run), remedy=RUN_AGAIN)
    return seal_and_report(plan, progress, counts)


def _run_name(plan: Plan) -> str:
    """Of the jobs of this plan in this output: the same each time, and nobody else's."""
    text = absolute(plan.store)
    digest = hashlib.sha256(f"{text}\n{plan.fingerprint}".encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text.rstrip("/").rpartition("/")[2])
    return f"crawl-{name}-{digest}"


def _refuse_other_parts(folder: Path, places: Sequence[Path]) -> None:
    """Two divisions of one plan at a time would make every unit twice, for nothing."""
    found = sorted(path.parent for path in folder.absolute().glob("*/status.json"))
    others = [RunFolder(path) for path in found if path not in places]
    look = Look(others)
    for run in others:
        if not (status := look.status(run)).state.ended:
            raise UserError(
                f"this crawl is going on in other parts: {run.path} is {status.state}; give the number of "
                "parts that it was started with, or end those with `submit cancel` first"
            )
