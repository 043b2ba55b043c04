"""What runs a crawl: the options, and what they start."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import UserError
from cluster.host import CORES
from cluster.job import ExecutorName
from cluster.parts import Part
from cluster.site import load_site, site_for_jobs
from ingest.crawl.divide import RUN_AGAIN, WORKERS_PER_CRAWLER
from ingest.crawl.on_ray import crawl_on_ray
from ingest.crawl.on_slurm import submit_to_slurm, wait_for_slurm
from ingest.crawl.on_this_machine import crawl_here
from ingest.plan.plan import Plan
from ingest.progress.counts import Counts, CrawlReport, Progress
from ingest.web.settings import FetchSettings

ExecutorOption = Annotated[ExecutorName, typer.Option("--executor", help="What to run the crawlers on.")]
Parts = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many crawlers to run, each with workers of its own; on SLURM, each is a job. Never changes "
        f"the result. [default: one per {WORKERS_PER_CRAWLER} workers; required for ray and slurm]",
    ),
]
PartWorkers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that check images; never changes the result. [default: one per core; for ray and "
        f"slurm, in each part: the site's cpus_per_rank, or {WORKERS_PER_CRAWLER}]",
    ),
]
Cluster = Annotated[
    str,
    typer.Option(
        envvar="SUBMIT_CLUSTER",
        help="For ray and slurm: the site file, a .yaml file or a name in configs/cluster.",
    ),
]
Runs = Annotated[Path, typer.Option(help="For slurm: the folder for its jobs.")]
Wait = Annotated[bool, typer.Option("--wait", help="For slurm: return only when the crawl has ended.")]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a crawl is spread; see the options.

    Raises:
        UserError: they do not go together, or there is no such site.
    """

    executor: ExecutorName
    parts: int | None
    workers: int | None
    cluster: str
    runs: Path
    wait: bool

    def __post_init__(self) -> None:
        if self.executor == "local":
            return
        load_site(self.cluster)
        if self.parts is None:
            raise UserError(f"say with --parts how many crawlers --executor {self.executor} is to run")


def run_plan(
    plan: Plan, spread: Spread, *, fetch: FetchSettings, progress: Progress, counts: Counts
) -> CrawlReport | None:
    """Do what is left of a plan; None if it was left to SLURM.

    Raises:
        UserError: as what runs the crawl says.
    """
    if spread.executor == "local":
        workers = spread.workers or CORES
        parts = spread.parts or math.ceil(workers / WORKERS_PER_CRAWLER)
        return crawl_here(plan, fetch=fetch, workers=workers, parts=parts, progress=progress, counts=counts)
    assert spread.parts is not None
    site = site_for_jobs(spread.cluster)
    site = site if spread.executor == "ray" else site.for_cpu_jobs()
    workers = spread.workers or site.cpus_per_rank or WORKERS_PER_CRAWLER
    if spread.executor == "ray":
        return crawl_on_ray(
            plan,
            fetch=fetch,
            workers=workers,
            crawlers=spread.parts,
            site=site,
            progress=progress,
            counts=counts,
        )
    submitted = submit_to_slurm(
        plan,
        fetch=fetch,
        workers=workers,
        parts=spread.parts,
        site=site,
        runs=spread.runs,
        counts=counts,
    )
    _tell(submitted.parts)
    submitted.refuse_waiting(RUN_AGAIN)
    # With nothing to submit, all units are there; a job that did not live to seal them may be missed.
    if spread.wait or not submitted.parts:
        return wait_for_slurm(plan, submitted.runs, progress=progress, counts=counts)
    return None


def _tell(parts: Sequence[Part]) -> None:
    for part in parts:
        how = "submitted" if part.new else "is going on"
        typer.echo(f"{part.run.path.name}: {how} as slurm job {part.id}", err=True)
    if parts:
        folder = parts[0].run.path.parent
        typer.echo(
            f"The last of them seals the dataset. `submit status --folder {folder}` shows their progress.",
            err=True,
        )
