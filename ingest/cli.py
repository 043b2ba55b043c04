"""The `ingest` command: images in the wild become sealed datasets, and datasets are looked at and checked."""

import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from cluster.doctor import Check, doctor_report, doctor_table
from cluster.errors import UserError
from cluster.wording import in_bytes, several, visible
from ingest.commands.card import card
from ingest.commands.counted import counted
from ingest.commands.crawl import crawl
from ingest.commands.dedup import dedup
from ingest.commands.gc import gc
from ingest.commands.index import index
from ingest.commands.options import CORES, DatasetFolder, Json, Workers
from ingest.commands.retry import retry
from ingest.commands.urls import urls
from ingest.commands.view import view
from ingest.dataset.open import open_dataset
from ingest.dataset.verify import Damage, Level, read_seal, verify_root, verify_units
from ingest.image.doctor import image_checks
from ingest.progress.crawl_progress import Meter
from ingest.report.provenance import name_of
from ingest.report.stats import Stats
from ingest.store.store import PosixStore


class Commands(TyperGroup):
    """Ends a command on a mistake of the user, or on Ctrl-C, with one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"ingest: {visible(str(error))}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            resumable = ctx.invoked_subcommand in ("crawl-shards", "index")
            go_on = "; run the same command again to go on where it stopped" if resumable else ""
            typer.echo(f"ingest: interrupted{go_on}", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="ingest",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
LISTED = 20
HOSTS_LISTED = 10


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Turn images nobody curated into sealed, checkable datasets."""
    logging.basicConfig(level=logging.INFO, format="ingest: %(message)s")
    # What Pillow warns of in a damaged file stands in that file's row, with its name.
    warnings.filterwarnings("ignore", module="PIL")


app.command("crawl-shards")(crawl)
app.command("dedup")(dedup)
app.command("view")(view)
app.command()(card)
app.command()(gc)
app.command()(index)
app.command()(retry)


@app.command()
def verify(
    dataset: DatasetFolder,
    level: Annotated[
        str, typer.Option(help="names, sizes, sha or decode: each also checks what the ones before it do.")
    ] = "sha",
    workers: Workers = CORES,
    as_json: Json = False,
) -> None:
    """Check that a dataset is whole, and name everything that is damaged. Exits with 1 if anything is."""
    if level.upper() not in Level.__members__:
        raise UserError(f"--level {level} is not a level: use names, sizes, sha or decode")
    chosen = Level[level.upper()]
    seal, damages = read_seal(dataset)
    images = 0
    if seal is not None:
        if chosen >= Level.SHA:
            damages += verify_root(dataset, seal)
        with Meter(Console(stderr=True)) as meter:
            for done, report in enumerate(verify_units(dataset, seal, chosen, workers=workers), 1):
                damages += report.damages
                images += report.images
                figures = [several(images, "image"), f"{len(damages):,} damaged"]
                meter.tell("verifying units", done=done, total=len(seal.units), figures=figures)
    if as_json:
        answer = {
            "path": str(dataset),
            "root": seal.root if seal else None,
            "level": level,
            "units": len(seal.units) if seal else 0,
            "images": images,
            "whole": not damages,
            "damages": [asdict(damage) for damage in damages],
        }
        typer.echo(json.dumps(answer, indent=2))
    else:
        _print_verdict(dataset, damages, chosen, images)
    if damages:
        raise typer.Exit(1)


def _print_verdict(dataset: str, damages: list[Damage], level: Level, images: int) -> None:
    for damage in damages:
        typer.echo(visible(damage.sentence))
    looked = f" ({several(images, 'image')} read)" if level >= Level.SHA else ""
    verdict = f"damaged: {several(len(damages), 'thing')}" if damages else "whole"
    typer.echo(f"{visible(str(dataset))} is {verdict}, at level {level.name.lower()}{looked}")


@app.command()
def stats(dataset: DatasetFolder, as_json: Json = False) -> None:
    """Count what is in a dataset: statuses and reasons, bytes, formats, sizes, labels."""
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
        ("images", found.image_bytes),
        ("shards", found.shard_bytes),
        ("meta", found.meta_bytes),
    ):
        table.add_row(name, in_bytes(size), "")
    if found.retryable:
        table.add_row("retryable", f"{found.retryable:,}", "of what failed")
    if found.hosts.hosts:
        table.add_row("hosts", f"{found.hosts.hosts:,}", "at least" if found.hosts.missing_at_most else "")
    statuses = {str(status): count for status, count in found.http_statuses.items()}
    failing = {host.host: host.failed for host in found.hosts.most_failed[:HOSTS_LISTED]}
    for name, counts in (
        ("format", found.formats),
        ("label", found.labels),
        ("http status", statuses),
        ("failed at host", failing),
    ):
        for row, (value, count) in enumerate(list(counts.items())[:LISTED]):
            table.add_row("" if row else name, f"{count:,}", Text(visible(value)))
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
    table = Table(box=None, pad_edge=False)
    table.add_column("", style="bold")
    for column in sizes["width"]:
        table.add_column(column, justify="right")
    for name, summary in sizes.items():
        table.add_row(name, *(f"{value:,}" for value in summary.values()))
    return table


@app.command()
def show(
    dataset: DatasetFolder,
    output: Annotated[
        Path | None, typer.Option(help="The page. [default: the dataset's name + .html]")
    ] = None,
    view: Annotated[
        str | None, typer.Option(help="Show images of this view, and the duplicates that it leaves out.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, max=2000, help="How many images to show.")] = 60,
    seed: Annotated[int, typer.Option(help="Which images to show.")] = 0,
) -> None:
    """Make one self-contained HTML page of a dataset: images, sizes, formats, and what was not kept."""
    from ingest.report import gallery

    page = Path(f"{name_of(dataset)}.html") if output is None else output
    if page.is_dir() or not page.parent.is_dir():
        wrong = "is a folder" if page.is_dir() else f"would lie in {page.parent}, and there is no such folder"
        raise UserError(f"--output {page} {wrong}: name a file in a folder that exists")
    seen = open_dataset(dataset, view=view)
    found = counted(dataset)
    text = gallery.show(dataset, found, view=view, samples=samples, seed=seed)
    PosixStore(page.parent).replace(page.name, text.encode())
    shown = several(min(samples, len(seen)), "image")
    typer.echo(f"{page} shows {shown} of {len(seen):,} ({in_bytes(len(text))})")


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="Where datasets would be written.")] = Path(),
    as_json: Json = False,
) -> None:
    """Say what is installed and active, and how to mend what is not."""
    checks: list[Check] = [*image_checks(), *doctor_report(folder)]
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        Console().print(doctor_table(checks))
    if any(check.required and check.status == "missing" for check in checks):
        raise typer.Exit(1)


app.command("urls")(urls)


def main() -> None:
    """The console script. `--debug` may stand anywhere on the line."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    app(arguments, prog_name="ingest")
