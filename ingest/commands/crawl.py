"""`ingest crawl-shards`: images from folders, tars and the web become a sealed dataset."""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from cluster.errors import UserError
from cluster.wording import duration, in_bytes, several, visible
from ingest.commands.crawl_options import (
    AllowPrivate,
    AllowSilent,
    CaptionColumn,
    ColumnNames,
    ColumnTypes,
    Connections,
    Contact,
    CropOption,
    Deadline,
    Decode,
    DenyNetwork,
    EncodingOption,
    Extend,
    FollowLinks,
    GiveUp,
    HostLimitsPath,
    Icc,
    IgnoreRobots,
    LabelColumn,
    MaxBytes,
    MaxPixels,
    MaxRedirects,
    MemoryMb,
    MetricsPath,
    Output,
    PerAddress,
    PerHost,
    PerHostRate,
    PerSite,
    Phash,
    Quality,
    Resize,
    Seconds,
    SegmentSeconds,
    Sources,
    Tries,
    UnitRows,
    UrlColumn,
    Video,
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
from ingest.commands.options import (
    IgnoreContentSignal,
    IgnoreContentUsage,
    IgnoreTdmReservation,
    IgnoreXRobots,
    Json,
    LabelFiles,
    LabelsFrom,
    end_if_nothing,
    heeded,
)
from ingest.crawl.crawl import plan_shards
from ingest.crawl.part import counts_json
from ingest.image.check import Treatment
from ingest.image.decode import ImageLimits
from ingest.plan.settings import VIDEOS, CrawlSettings
from ingest.progress.counts import Counts, CrawlReport
from ingest.progress.crawl_progress import CrawlProgress
from ingest.progress.meter import Meter
from ingest.sources.url_list import TYPES, Columns
from ingest.video.check import VideoTreatment
from ingest.web.host_limits import read_host_limits
from ingest.web.settings import FetchSettings

DEFAULTS = CrawlSettings()


def crawl(
    sources: Sources,
    *,
    output: Output,
    extend: Extend = False,
    follow_links: FollowLinks = False,
    resize: Resize = None,
    crop: CropOption = None,
    encoding: EncodingOption = None,
    quality: Quality = None,
    icc: Icc = True,
    phash: Phash = True,
    video: Video = False,
    segment_seconds: SegmentSeconds = None,
    allow_silent: AllowSilent = False,
    decode: Decode = True,
    unit_rows: UnitRows = None,
    max_bytes: MaxBytes = None,
    max_pixels: MaxPixels = None,
    seconds: Seconds = None,
    memory_mb: MemoryMb = None,
    url_column: UrlColumn = None,
    caption_column: CaptionColumn = None,
    label_column: LabelColumn = None,
    columns: ColumnNames = None,
    column_type: ColumnTypes = None,
    labels_from: LabelsFrom = None,
    labels: LabelFiles = None,
    contact: Contact = None,
    deadline: Deadline = DEFAULTS.fetch.deadline,
    tries: Tries = DEFAULTS.fetch.tries,
    max_redirects: MaxRedirects = DEFAULTS.fetch.max_redirects,
    per_host: PerHost = DEFAULTS.fetch.per_host,
    per_address: PerAddress = DEFAULTS.fetch.per_address,
    per_host_rate: PerHostRate = DEFAULTS.fetch.per_host_rate,
    host_limits: HostLimitsPath = None,
    connections: Connections = DEFAULTS.fetch.connections,
    per_site: PerSite = None,
    give_up: GiveUp = None,
    ignore_robots: IgnoreRobots = False,
    ignore_x_robots: IgnoreXRobots = False,
    ignore_tdm_reservation: IgnoreTdmReservation = False,
    ignore_content_signal: IgnoreContentSignal = False,
    ignore_content_usage: IgnoreContentUsage = False,
    allow_private: AllowPrivate = None,
    deny_network: DenyNetwork = None,
    metrics_file: MetricsPath = None,
    workers: PartWorkers = None,
    executor: ExecutorOption = "local",
    parts: Parts = None,
    cluster: Cluster = "default",
    runs: Runs = Path("runs"),
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Fetch or read images or videos, and check, shard and seal them. Run it again to continue."""
    for option, given in (("--crop", crop), ("--encoding", encoding), ("--quality", quality)):
        if given is not None and resize is None:
            raise UserError(f"{option} is used with --resize only: add --resize, or leave {option} out")
    _refuse_misplaced(
        video,
        of_images={"--resize": resize is not None, "--no-icc": not icc, "--no-phash": not phash},
        of_videos={
            "--segment-seconds": segment_seconds is not None,
            "--allow-silent": allow_silent,
            "--no-decode": not decode,
        },
    )
    usual = VIDEOS if video else DEFAULTS
    limits = usual.treatment.limits
    treatment = Treatment(
        limits=ImageLimits(
            max_bytes=max_bytes or limits.max_bytes, max_pixels=max_pixels or limits.max_pixels
        ),
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
        host_limits=() if host_limits is None else read_host_limits(host_limits, per_address=per_address),
        connections=connections,
        deadline=deadline,
        tries=tries,
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
        unit_rows=unit_rows or usual.unit_rows,
        treatment=treatment,
        seconds=seconds or usual.seconds,
        memory_mb=memory_mb or usual.memory_mb,
        fetch=fetch,
        per_site=per_site,
        video=VideoTreatment(
            segment_seconds=VideoTreatment().segment_seconds if segment_seconds is None else segment_seconds,
            allow_silent=allow_silent,
            decode=decode,
        )
        if video
        else None,
    )
    listed = Columns(
        url=url_column,
        caption=caption_column,
        labels=label_column,
        names=None if columns is None else tuple(map(str.strip, columns.split(","))),
        types=_types(column_type or ()),
    )
    spread = Spread(executor=executor, parts=parts, workers=workers, cluster=cluster, runs=runs, wait=wait)
    metrics = None
    if metrics_file is not None:
        from ingest.progress.metrics_file import MetricsFile  # takes long

        metrics = MetricsFile(metrics_file, output=output)
    with Meter(Console(stderr=True)) as meter:
        progress, counts = CrawlProgress(meter, metrics=metrics), Counts()
        plan = plan_shards(
            sources,
            output,
            settings,
            progress=progress,
            counts=counts,
            columns=listed,
            labels_from=labels_from,
            labels=labels or (),
            extend=extend,
            follow_links=follow_links,
        )
        fetch = replace(fetch, give_up_at=in_hours(give_up))
        report = run_plan(plan, spread, fetch=fetch, progress=progress, counts=counts)
        progress.end(counts)
    if report is not None:
        tell_crawl(report, progress.seconds, as_json=as_json, noun="clip" if video else "image")


def _refuse_misplaced(video: bool, *, of_images: dict[str, bool], of_videos: dict[str, bool]) -> None:
    """What is said of images is said of images, and what is said of videos of videos."""
    for option in (option for option, given in (of_images if video else of_videos).items() if given):
        way = "is of images, and --video is given" if video else "is of videos"
        raise UserError(f"{option} {way}: leave it out{'' if video else ', or add --video'}")


def _types(given: Sequence[str]) -> dict[str, str]:
    """What --column-type says, by the column."""
    types: dict[str, str] = {}
    for text in given:
        name, _, kind = text.rpartition("=")
        if not name or kind not in TYPES:
            raise UserError(f"--column-type {text} is not NAME=TYPE with a type of {', '.join(TYPES)}")
        types[name] = kind
    return types


def in_hours(hours: float | None) -> float | None:
    """When --give-up is, seconds since 1970."""
    return None if hours is None else time.time() + 3600 * hours


def crawl_json(report: CrawlReport, seconds: float) -> dict[str, Any]:
    """What a crawl made, for scripts."""
    made = {"output": str(report.output), "root": report.root, "seconds": round(seconds, 3)}
    return made | counts_json(report.counts)


def tell_crawl(report: CrawlReport, seconds: float, *, as_json: bool, noun: str = "image") -> None:
    """Say what a crawl made, of images or clips; ends the command with status 1 if that is nothing."""
    if as_json:
        typer.echo(json.dumps(crawl_json(report, seconds), indent=2))
    else:
        _print(report, seconds, noun)
    end_if_nothing(report.counts.kept)


def _print(report: CrawlReport, seconds: float, noun: str) -> None:
    counts = report.counts
    again = f", {counts.resumed:,} of them by an earlier run" if counts.resumed else ""
    rows = [
        ("dataset", visible(str(report.output))),
        ("root", report.root),
        (
            "planned",
            f"{several(counts.planned, 'file' if noun == 'image' else 'part')}{again}{_left_out(counts)}",
        ),
        ("kept", f"{several(counts.kept, noun)}, {in_bytes(counts.bytes_stored)}"),
        ("rejected", _reasons(counts.rejected)),
        ("failed", _reasons(counts.failed)),
    ]
    for name, value in rows:
        typer.echo(f"{name:<9} {value}")
    if counts.rejected["link_outside"]:
        typer.echo("--follow-links follows links that lead out of a folder or to another one.")
    if counts.failed["folder_unreadable"] or counts.failed["archive_unreadable"]:
        typer.echo("Once unreadable folders and archives can be read, --extend adds what is in them.")
    if counts.failed["given_up"]:
        typer.echo("`ingest retry` tries again what was given up.")
    if not counts.kept:
        typer.echo("Nothing was kept: the reasons are above, and in `ingest show`.")
        if counts.rejected["not_an_image"]:
            typer.echo("If these are videos, crawl them with --video, to another --output.")
    decided = counts.done - counts.resumed
    speed = f"{decided / seconds:,.0f} {noun}s/s, {counts.bytes_read / 1e6 / seconds:,.1f} MB/s"
    typer.echo(f"took      {duration(seconds)}: {speed}")
    typer.echo(f"Look at it:  ingest show {shlex.quote(str(report.output))}")


def _left_out(counts: Counts) -> str:
    """Rows of lists that are no attempts of their own."""
    merged = f"; {several(counts.merged, 'row')} merged, as their URL is that of a row before"
    known = f"; {several(counts.known, 'row')} left out, as planned before"
    over = f"; {several(counts.over_per_site, 'row')} left out, as their site has enough (--per-site)"
    told = ((merged, counts.merged), (known, counts.known), (over, counts.over_per_site))
    return "".join(text for text, rows in told if rows)


def _reasons(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    reasons = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"{total:,}" + (
        ": " + ", ".join(f"{n:,} {visible(reason)}" for reason, n in reasons) if total else ""
    )
