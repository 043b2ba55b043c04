"""`ingest retry`: another try at what failed and may succeed by now."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.output_trouble import writing
from ingest.commands.crawl import crawl_json, in_hours, tell_crawl
from ingest.commands.crawl_options import (
    Connections,
    Contact,
    GiveUp,
    HostLimitsPath,
    PerAddress,
    PerHost,
    PerHostRate,
)
from ingest.commands.executor_options import (
    Cluster,
    ExecutorOption,
    Parts,
    PartWorkers,
    Runs,
    Spread,
    Wait,
    run_plan,
)
from ingest.commands.options import DatasetFolder, Json
from ingest.dataset.open import open_dataset
from ingest.dataset.plan_record import noun_of
from ingest.plan.retry import plan_retry
from ingest.progress.counts import Counts, CrawlReport
from ingest.progress.crawl_progress import CrawlProgress
from ingest.progress.meter import Meter
from ingest.store.open import open_store
from ingest.web.host_limits import read_host_limits
from ingest.web.settings import FetchSettings

DEFAULTS = FetchSettings()


def retry(
    dataset: DatasetFolder,
    *,
    deadline: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds for one request. [default: as before]")
    ] = None,
    tries: Annotated[
        int | None,
        typer.Option("--attempts", min=1, help="How many times to try a URL. [default: as before]"),
    ] = None,
    contact: Contact = None,
    per_host: PerHost = DEFAULTS.per_host,
    per_address: PerAddress = DEFAULTS.per_address,
    per_host_rate: PerHostRate = None,
    host_limits: HostLimitsPath = None,
    connections: Connections = DEFAULTS.connections,
    give_up: GiveUp = None,
    workers: PartWorkers = None,
    executor: ExecutorOption = "local",
    parts: Parts = None,
    cluster: Cluster = "default",
    runs: Runs = Path("runs"),
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Try again what failed but may succeed now, and add the result to the dataset."""
    store = open_store(dataset)
    spread = Spread(executor=executor, parts=parts, workers=workers, cluster=cluster, runs=runs, wait=wait)
    with writing(store.root), Meter(Console(stderr=True)) as meter:
        plan = plan_retry(store, deadline=deadline, tries=tries)
        if plan is not None:
            progress, counts = CrawlProgress(meter), Counts()
            fetch = replace(
                plan.settings.fetch,
                contact=contact,
                per_host=per_host,
                per_address=per_address,
                per_host_rate=per_host_rate,
                host_limits=()
                if host_limits is None
                else read_host_limits(host_limits, per_address=per_address),
                connections=connections,
                give_up_at=in_hours(give_up),
            )
            report = run_plan(plan, spread, fetch=fetch, progress=progress, counts=counts)
            progress.end(counts)
    if plan is None:
        _tell_of_nothing(dataset, as_json=as_json)
    elif report is not None:
        tell_crawl(report, progress.seconds, as_json=as_json, noun=noun_of(store))


def _tell_of_nothing(dataset: str, *, as_json: bool) -> None:
    if as_json:
        opened = open_dataset(dataset)
        nothing = CrawlReport(output=opened.store.root, root=opened.root, counts=Counts())
        typer.echo(json.dumps(crawl_json(nothing, 0.0), indent=2))
    else:
        typer.echo("There is nothing to retry: nothing that failed may succeed later.")
