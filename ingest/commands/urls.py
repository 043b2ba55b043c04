"""`ingest urls`: web archives become a list of image links."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.host import CORES
from cluster.wording import duration, several, visible
from ingest.commands.options import (
    IgnoreContentSignal,
    IgnoreContentUsage,
    IgnoreTdmReservation,
    IgnoreXRobots,
    Json,
    Workers,
    end_if_nothing,
    heeded,
)
from ingest.links.link_list import LinkCounts, list_links
from ingest.progress.meter import Meter
from ingest.sources.expand import expand

_LISTED = 20


def urls(
    archives: Annotated[
        list[str],
        typer.Argument(
            metavar="WARC|WAT...",
            help="Local files, s3://, gs://, az://, https://, or what fsspec opens; * in the name.",
        ),
    ],
    *,
    output: Annotated[Path, typer.Option(help="The list to write: .parquet or .csv.")],
    ignore_opt_outs: Annotated[
        bool, typer.Option("--ignore-opt-outs", help="Ignore all of these; the list records this.")
    ] = False,
    ignore_x_robots: IgnoreXRobots = False,
    ignore_tdm_reservation: IgnoreTdmReservation = False,
    ignore_content_signal: IgnoreContentSignal = False,
    ignore_content_usage: IgnoreContentUsage = False,
    workers: Workers = CORES,
    as_json: Json = False,
) -> None:
    """List the images shown on web pages: url, alt, page_url, page_host; every URL once."""
    started = time.monotonic()
    named = [place for archive in archives for place in expand(archive)]
    with Meter(Console(stderr=True)) as meter:

        def progress(counts: LinkCounts) -> None:
            figures = [several(counts.pages, "page"), several(counts.found, "image")]
            meter.tell("reading archives", done=counts.files, total=len(named), figures=figures)

        obeyed = heeded(
            ignore_x_robots=ignore_x_robots,
            ignore_tdm_reservation=ignore_tdm_reservation,
            ignore_content_signal=ignore_content_signal,
            ignore_content_usage=ignore_content_usage,
        )
        if ignore_opt_outs:
            obeyed = frozenset()
        counts = list_links(named, output, workers=workers, heeded=obeyed, progress=progress)
    seconds = time.monotonic() - started
    if as_json:
        answer = {"output": str(output), "seconds": round(seconds, 3), **asdict(counts)}
        typer.echo(json.dumps(answer, indent=2))
    else:
        _print(counts, output, seconds)
    end_if_nothing(counts.distinct)


def _print(counts: LinkCounts, output: Path, seconds: float) -> None:
    opt_outs = several(counts.left_out, "page") + " left out"
    if ignored := counts.opted_out - counts.left_out:
        opt_outs += f", {ignored:,} listed all the same"
    rows = [
        ("list", visible(str(output))),
        ("read", f"{several(counts.records, 'record')} in {several(counts.files, 'file')}"),
        ("pages", f"{counts.pages:,}"),
        ("opt-outs", opt_outs),
        ("images", f"{counts.found:,}"),
        ("distinct", f"{several(counts.distinct, 'URL')} from the pages of {several(counts.hosts, 'host')}"),
        ("damaged", several(len(counts.damaged), "file")),
    ]
    for name, value in rows:
        typer.echo(f"{name:<9} {value}")
    for archive, reason in list(counts.damaged.items())[:_LISTED]:
        typer.echo(f"          {visible(archive)}: {reason}; what can be read is in the list")
    if len(counts.damaged) > _LISTED:
        typer.echo(f"          and {len(counts.damaged) - _LISTED:,} more: --json names all")
    if not counts.distinct:
        typer.echo("Nothing was found: the list has no rows.")
    typer.echo(f"took      {duration(seconds)}: {counts.pages / seconds:,.0f} pages/s")
