"""`ingest stats`: what a dataset holds."""

import json

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.host import CORES
from cluster.map.processes import processes
from cluster.wording import in_bytes, several, visible
from ingest.commands.options import DatasetFolder, Json
from ingest.progress.meter import Meter
from ingest.report.stats import Stats, count

LISTED = 20
HOSTS_LISTED = 10


def stats(dataset: DatasetFolder, as_json: Json = False) -> None:
    """Print statistics of a dataset: statuses and reasons, bytes, formats, sizes, labels."""
    found = counted(dataset)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        _print_stats(found)


def _print_stats(found: Stats) -> None:
    share = 100 / max(1, found.planned)
    typer.echo(f"{visible(found.path)}\nroot {found.root}\n")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    units = f"in {several(found.units, 'unit')}"
    table.add_row("planned", f"{found.planned:,}", units)
    for status in ("kept", "rejected", "failed"):
        total = getattr(found, status)
        table.add_row(status, f"{total:,}", f"{total * share:.1f} %")
        for loss in found.losses:
            if loss.status == status:
                table.add_row("", f"{loss.count:,}", Text("  " + visible(loss.reason)))
    for name, size in (
        (f"{found.noun}s", found.image_bytes),
        ("shards", found.shard_bytes),
        ("meta", found.meta_bytes),
    ):
        table.add_row(name, in_bytes(size), "")
    if found.retryable:
        table.add_row("retryable", f"{found.retryable:,}", "of what failed")
    if found.hosts.hosts:
        table.add_row("hosts", f"{found.hosts.hosts:,}", "at least" if found.hosts.missing_at_most else "")
    clips = found.clips
    if clips.clips:
        table.add_row("hours", f"{clips.hours:,.2f}", "")
        for name, number in (
            ("without sound", clips.without_sound),
            ("quiet", clips.quiet),
            ("still", clips.still),
        ):
            table.add_row(name, f"{number:,}", "")
    statuses = {str(status): times for status, times in found.http_statuses.items()}
    failing = {host.host: host.failed for host in found.hosts.most_failed[:HOSTS_LISTED]}
    for name, counts in (
        ("format", found.formats),
        ("video codec", clips.video_codecs),
        ("audio codec", clips.audio_codecs),
        ("label", found.labels),
        ("split", found.splits),
        ("http status", statuses),
        ("failed at host", failing),
    ):
        for row, (value, times) in enumerate(list(counts.items())[:LISTED]):
            table.add_row("" if row else name, f"{times:,}", Text(visible(value)))
        if len(counts) > LISTED:
            table.add_row("", f"{sum(list(counts.values())[LISTED:]):,}", f"{len(counts) - LISTED:,} others")
    Console().print(table)
    if found.kept:
        typer.echo()
        Console().print(_size_table(found))


def _size_table(found: Stats) -> Table:
    sizes = {
        "width": found.widths.summary(),
        "height": found.heights.summary(),
        "shorter side": found.short_sides.summary(),
        "longer side": found.long_sides.summary(),
        "bytes": found.sizes.summary(),
    }
    if found.clips.clips:
        sizes["length, ms"] = found.clips.milliseconds.summary()
        sizes["keyframe gap, ms"] = found.clips.gaps.summary()
    table = Table(box=None, pad_edge=False)
    table.add_column("", style="bold")
    for column in sizes["width"]:
        table.add_column(column, justify="right")
    for name, summary in sizes.items():
        table.add_row(name, *(f"{value:,}" for value in summary.values()))
    return table


def counted(dataset: str) -> Stats:
    """Count it, and show how far that is."""
    with Meter(Console(stderr=True)) as meter, processes(CORES) as map_tasks:
        return count(
            dataset,
            progress=lambda done, total: meter.tell("counting units", done=done, total=total),
            map_tasks=map_tasks,
        )
