"""`ingest crawl-shards`: images from folders, tars and the web become a sealed dataset."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.errors import UserError
from cluster.wording import duration, in_bytes, several, visible
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
from ingest.commands.options import (
    IgnoreContentSignal,
    IgnoreContentUsage,
    IgnoreTdmReservation,
    IgnoreXRobots,
    Json,
    LabelFiles,
    LabelsFrom,
    MaxBytes,
    MaxPixels,
    MemoryMb,
    Seconds,
    UnitRows,
    heeded,
)
from ingest.crawl.crawl import plan_shards
from ingest.crawl.part import counts_json
from ingest.image.check import Crop, Encoding, Treatment
from ingest.image.decode import ImageLimits
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import Counts, CrawlReport
from ingest.progress.crawl_progress import CrawlProgress
from ingest.progress.meter import Meter
from ingest.progress.metrics_file import MetricsFile
from ingest.sources.url_list import TYPES, Columns
from ingest.web.settings import FetchSettings

DEFAULTS = CrawlSettings()
LIMITS = DEFAULTS.treatment.limits
Contact = Annotated[
    str | None,
    typer.Option(
        envvar="INGEST_CONTACT", help="Where webmasters reach you: a URL or an e-mail, in the User-Agent."
    ),
]
PerHost = Annotated[int, typer.Option(min=1, help="Connections to a host at a time.")]
PerAddress = Annotated[
    int, typer.Option(min=1, help="Connections to an address at a time, whichever hosts it serves.")
]
PerHostRate = Annotated[float | None, typer.Option(min=0.001, help="Requests to a host per second.")]
Connections = Annotated[int, typer.Option(min=1, help="At a time, over all hosts.")]


def crawl(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Folders, local tars, and lists of URLs (.parquet, .csv, .tsv, .json, .jsonl, .txt; .gz, "
            ".zst; local, s3://, gs://, az:// or http://; * in the name).",
        ),
    ],
    *,
    output: Annotated[
        str,
        typer.Option(
            help="The dataset's folder or bucket (s3://, gs://, az://); a crawl that stopped goes on there."
        ),
    ],
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Add to a dataset what it does not have: of other sources, or of its own that have grown.",
        ),
    ] = False,
    follow_links: Annotated[
        bool,
        typer.Option("--follow-links", help="Of folders, also those that lead out of them, and to folders."),
    ] = False,
    resize: Annotated[
        int | None, typer.Option(min=1, help="Shorter side in pixels; without it, bytes are kept.")
    ] = None,
    crop: Annotated[
        Crop | None,
        typer.Option(help="All of it, or its middle square, with --resize. [default: keep_ratio]"),
    ] = None,
    encoding: Annotated[
        Encoding | None, typer.Option(help="What is stored, with --resize. [default: jpeg]")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Of the encoder, with --resize. [default: 95]")
    ] = None,
    icc: Annotated[
        bool,
        typer.Option(
            "--icc/--no-icc",
            help="Follow colour profiles: to sRGB with --resize, otherwise they stay in the file. Without, "
            "they are left out, and the numbers stay.",
        ),
    ] = True,
    phash: Annotated[
        bool,
        typer.Option(help="Make the perceptual hash; without it, the pixels of a kept JPEG stay unread."),
    ] = True,
    unit_rows: UnitRows = DEFAULTS.unit_rows,
    max_bytes: MaxBytes = LIMITS.max_bytes,
    max_pixels: MaxPixels = LIMITS.max_pixels,
    seconds: Seconds = DEFAULTS.seconds,
    memory_mb: MemoryMb = DEFAULTS.memory_mb,
    url_column: Annotated[str | None, typer.Option(help="Of lists. [default: seen from the names]")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Of lists: alt text or caption.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Of lists: labels or hashtags.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="NAME,…", help="Of a csv or tsv without a header: its columns, in their order."),
    ] = None,
    column_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TYPE",
            help=f"Of csv, tsv and JSON, whose values are text: {', '.join(TYPES)}. Repeatable.",
        ),
    ] = None,
    labels_from: LabelsFrom = None,
    labels: LabelFiles = None,
    contact: Contact = None,
    deadline: Annotated[
        float, typer.Option(min=0.1, help="Seconds for one attempt at a URL, redirects included.")
    ] = DEFAULTS.fetch.deadline,
    attempts: Annotated[
        int, typer.Option(min=1, help="How often a URL is tried that may succeed later.")
    ] = DEFAULTS.fetch.attempts,
    max_redirects: Annotated[int, typer.Option(min=0)] = DEFAULTS.fetch.max_redirects,
    per_host: PerHost = DEFAULTS.fetch.per_host,
    per_address: PerAddress = DEFAULTS.fetch.per_address,
    per_host_rate: PerHostRate = DEFAULTS.fetch.per_host_rate,
    connections: Connections = DEFAULTS.fetch.connections,
    ignore_robots: Annotated[
        bool, typer.Option("--ignore-robots", help="Do not ask for robots.txt; the dataset says so.")
    ] = False,
    ignore_x_robots: IgnoreXRobots = False,
    ignore_tdm_reservation: IgnoreTdmReservation = False,
    ignore_content_signal: IgnoreContentSignal = False,
    ignore_content_usage: IgnoreContentUsage = False,
    allow_private: Annotated[
        list[str] | None,
        typer.Option(
            help="A network, as CIDR, that may be asked though it is not public; addresses of this machine "
            "and of a cloud's services, one by one. Repeatable."
        ),
    ] = None,
    deny_network: Annotated[
        list[str] | None,
        typer.Option(help="A network, as CIDR, that may not be asked, whatever is allowed. Repeatable."),
    ] = None,
    metrics_file: Annotated[
        Path | None,
        typer.Option(
            help="Written every ten seconds, for Prometheus; *.prom in node-exporter's textfile folder."
        ),
    ] = None,
    workers: PartWorkers = None,
    executor: ExecutorOption = "local",
    parts: Parts = None,
    cluster: Cluster = "default",
    runs: Runs = Path("runs"),
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Fetch or read images, check, shard and seal them. Run again, it goes on where it stopped."""
    for option, given in (("--crop", crop), ("--encoding", encoding), ("--quality", quality)):
        if given is not None and resize is None:
            raise UserError(f"{option} is used with --resize only: add --resize, or leave {option} out")
    treatment = Treatment(
        limits=ImageLimits(max_bytes=max_bytes, max_pixels=max_pixels),
        resize=resize,
        crop=crop or DEFAULTS.treatment.crop,
        encoding=encoding or DEFAULTS.treatment.encoding,
        quality=quality or DEFAULTS.treatment.quality,
        icc=icc,
        phash=phash,
    )
    fetch = FetchSettings(
        contact=contact,
        per_host=per_host,
        per_address=per_address,
        per_host_rate=per_host_rate,
        connections=connections,
        deadline=deadline,
        attempts=attempts,
        max_redirects=max_redirects,
        robots=not ignore_robots,
        heeded=heeded(
            ignore_x_robots=ignore_x_robots,
            ignore_tdm_reservation=ignore_tdm_reservation,
            ignore_content_signal=ignore_content_signal,
            ignore_content_usage=ignore_content_usage,
        ),
        allow_private=tuple(allow_private or ()),
        deny_network=tuple(deny_network or ()),
    )
    settings = CrawlSettings(
        unit_rows=unit_rows, treatment=treatment, seconds=seconds, memory_mb=memory_mb, fetch=fetch
    )
    spread = Spread(executor=executor, parts=parts, workers=workers, cluster=cluster, runs=runs, wait=wait)
    with Meter(Console(stderr=True)) as meter:
        metrics = None if metrics_file is None else MetricsFile(metrics_file, output=output)
        progress = CrawlProgress(meter, metrics=metrics)
        counts = Counts()
        plan = plan_shards(
            sources,
            output,
            settings,
            progress=progress,
            counts=counts,
            columns=Columns(
                url=url_column,
                caption=caption_column,
                labels=label_column,
                names=None if columns is None else tuple(columns.split(",")),
                types=_types(column_type or ()),
            ),
            labels_from=labels_from,
            labels=labels or (),
            extend=extend,
            follow_links=follow_links,
        )
        report = run_plan(plan, spread, fetch=fetch, progress=progress, counts=counts)
        progress.end(counts)
    if report is None:
        return
    if as_json:
        typer.echo(json.dumps(crawl_json(report, progress.seconds), indent=2))
    else:
        print_crawl(report, progress.seconds)
    end_if_nothing_was_kept(report)


def end_if_nothing_was_kept(report: CrawlReport) -> None:
    """A script that goes on with an empty dataset fails later, and further away from what is wrong."""
    if not report.counts.kept:
        raise typer.Exit(1)


def _types(given: Sequence[str]) -> dict[str, str]:
    """What --column-type says, by the column."""
    types: dict[str, str] = {}
    for text in given:
        name, _, kind = text.rpartition("=")
        if not name or kind not in TYPES:
            raise UserError(f"--column-type {text} is not NAME=TYPE with a type of {', '.join(TYPES)}")
        types[name] = kind
    return types


def crawl_json(report: CrawlReport, seconds: float) -> dict[str, Any]:
    """What a crawl made, for scripts."""
    made = {"output": str(report.output), "root": report.root, "seconds": round(seconds, 3)}
    return made | counts_json(report.counts)


def print_crawl(report: CrawlReport, seconds: float) -> None:
    """What a crawl made, for people."""
    counts = report.counts
    again = f", {counts.resumed:,} of them by an earlier run" if counts.resumed else ""
    rows = [
        ("dataset", visible(str(report.output))),
        ("root", report.root),
        ("planned", f"{several(counts.planned, 'file')}{again}{_left_out(counts)}"),
        ("kept", f"{several(counts.kept, 'image')}, {in_bytes(counts.bytes_stored)}"),
        ("rejected", _reasons(counts.rejected)),
        ("failed", _reasons(counts.failed)),
    ]
    for name, value in rows:
        typer.echo(f"{name:<9} {value}")
    if counts.rejected["link_outside"]:
        typer.echo("Links out of a folder, or to another, are followed with --follow-links.")
    if counts.failed["folder_unreadable"]:
        typer.echo("What is in unreadable folders is added, once they are readable, with --extend.")
    if not counts.kept:
        typer.echo("Nothing was kept: see the reasons above, and with `ingest show`.")
    decided = counts.done - counts.resumed
    speed = f"{decided / seconds:,.0f} images/s, {counts.bytes_read / 1e6 / seconds:,.1f} MB/s"
    typer.echo(f"took      {duration(seconds)}: {speed}")
    typer.echo(f"Look at it:  ingest show {shlex.quote(str(report.output))}")


def _left_out(counts: Counts) -> str:
    """Rows of lists that are no attempts of their own."""
    merged = f"; {several(counts.merged, 'row')} merged, as their URL is that of a row before"
    known = f"; {several(counts.known, 'row')} left out, as planned before"
    return (merged if counts.merged else "") + (known if counts.known else "")


def _reasons(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    reasons = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"{total:,}" + (
        ": " + ", ".join(f"{n:,} {visible(reason)}" for reason, n in reasons) if total else ""
    )
