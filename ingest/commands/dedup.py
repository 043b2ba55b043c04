"""`ingest dedup`: a view without duplicates, and without what evaluations test on."""

import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.errors import UserError
from cluster.host import CORES
from cluster.job import ExecutorName
from cluster.map.on_ray import on_ray
from cluster.map.on_slurm import on_slurm
from cluster.map.processes import processes
from cluster.map.tasks import MapTasks
from cluster.site import site_for_jobs
from cluster.wording import duration, several, visible
from ingest.commands.executor_options import Cluster, Runs
from ingest.commands.options import DatasetFolder, Json, Workers, end_if_nothing
from ingest.dataset.plan_record import noun_of
from ingest.dedup.dedup import DedupReport
from ingest.dedup.dedup import dedup as find_duplicates
from ingest.dedup.hamming import MAX_RADIUS
from ingest.progress.meter import Meter
from ingest.store.open import name_of, open_store


def dedup(
    dataset: DatasetFolder,
    *,
    name: Annotated[str, typer.Option(help="Name of the new view.")],
    near: Annotated[
        bool,
        typer.Option(
            "--near/--exact",
            help="Drop images that look alike, or only equal bytes; letters, logos and drawings look alike.",
        ),
    ] = True,
    hamming: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_RADIUS,
            help="Bits in which the hashes of near duplicates may differ; mostly they differ in 2, 4, 6, ...",
        ),
    ] = 4,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATASET", help="Drop what equals or resembles an image of this dataset. Repeatable."
        ),
    ] = None,
    within: Annotated[
        str | None, typer.Option(metavar="VIEW", help="Consider only the samples of this view.")
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            help="A folder for temporary files: 104 bytes per image at --hamming 4. For ray and slurm, one "
            "that all nodes can reach."
        ),
    ] = None,
    workers: Workers = CORES,
    executor: Annotated[
        ExecutorName, typer.Option(help="What to run it on; never changes the result.")
    ] = "local",
    parts: Annotated[
        int | None,
        typer.Option(
            min=1, help="For ray and slurm: how many processes compare, each on one core; on SLURM, jobs."
        ),
    ] = None,
    cluster: Cluster = "default",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Make a view that keeps the first image of each group of duplicates."""
    started = time.monotonic()
    tasks = _executor(
        executor,
        workers=workers,
        parts=parts,
        cluster=cluster,
        name=f"dedup-{name_of(dataset)}-{name}",
        runs=runs,
        scratch=scratch,
    )
    with Meter(Console(stderr=True)) as meter, tasks as map_tasks:
        report = find_duplicates(
            dataset,
            name,
            radius=hamming if near else None,
            against=against or (),
            within=within,
            scratch=scratch,
            map_tasks=map_tasks,
            progress=lambda doing, done, total: meter.tell(doing, done=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps({"path": dataset} | asdict(report), indent=2))
    else:
        _print(report, dataset, noun_of(open_store(dataset)), near=near, seconds=time.monotonic() - started)
    end_if_nothing(report.kept)


def _executor(
    executor: ExecutorName,
    *,
    workers: int,
    parts: int | None,
    cluster: str,
    name: str,
    runs: Path,
    scratch: Path | None,
) -> AbstractContextManager[MapTasks]:
    """What does the tasks; see the options."""
    if executor == "local":
        if parts is not None:
            raise UserError(
                "--parts is for ray and slurm: on this machine, say with --workers how many compare"
            )
        return processes(workers)
    if parts is None:
        raise UserError(f"say with --parts how many tasks --executor {executor} is to do at a time")
    if scratch is None:
        raise UserError(f"--executor {executor} needs --scratch: a folder that all nodes reach by its name")
    site = site_for_jobs(cluster)
    if executor == "ray":
        return nullcontext(on_ray(site, parts=parts))
    return nullcontext(on_slurm(site, name=name, parts=parts, runs=runs, scratch=scratch))


def _print(report: DedupReport, dataset: str, noun: str, *, near: bool, seconds: float) -> None:
    typer.echo(f"view       {report.view} of {visible(dataset)}, root {report.root[:12]}")
    typer.echo(f"kept       {report.kept:,} of {several(report.samples, noun)}")
    typer.echo(f"dropped    {report.exact:,} with equal bytes, {report.near:,} that look alike")
    typer.echo(f"for        {several(report.groups, f'other {noun}')}")
    if report.evaluation:
        typer.echo(f"of these   {report.evaluation:,} for {noun}s of evaluations")
    if near and report.unhashed + report.flat:
        typer.echo(
            f"by bytes   {report.unhashed:,} without a perceptual hash and {report.flat:,} too flat for one "
            "were compared by their bytes only"
        )
    if report.evaluation_unhashed:
        typer.echo(
            f"careful    {several(report.evaluation_unhashed, f'evaluation {noun}')} without a useful "
            "perceptual hash: near copies of them may be left"
        )
    if report.hot.buckets:
        hot = report.hot
        typer.echo(
            f"careful    {several(hot.buckets, 'bucket')} of very many similar hashes ({hot.members:,} "
            f"entries): {hot.not_compared:,} pairs were not compared, near duplicates among them may be left"
        )
    if not report.kept:
        typer.echo(f"Nothing is kept: every {noun} is one of an evaluation, or there was none before.")
    typer.echo(f"took       {duration(seconds)}")
