"""`ingest view`: make a view by filtering, or list a dataset's views."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.errors import UserError
from cluster.host import CORES
from cluster.map.processes import processes
from cluster.wording import several, visible
from ingest.commands.options import DatasetFolder, Json, Workers, end_if_nothing
from ingest.dataset.open import open_dataset
from ingest.dataset.plan_record import noun_of
from ingest.dataset.view import read_view, view_names
from ingest.filter.filter import Filter, FilterReport, Matched, filter_view
from ingest.filter.per_label import Drawn, PerLabel
from ingest.progress.meter import Meter
from ingest.store.open import open_store

_LONGEST_NAME = 200
_SHORT_NAMED = 20


def view(
    dataset: DatasetFolder,
    *,
    name: Annotated[
        str | None, typer.Option(help="Name of the new view; without it, views are listed.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Keep what matches: 'width >= 256', \"label in [cat, dog] or caption like '%cat%'\", "
            "with and, or, not, in, like, between, is null as in SQL. Repeatable: all.",
        ),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Drop the keys and URLs in this file: txt, csv, Parquet. Repeatable."
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Keep only the keys and URLs in this file, or the file names if it has nothing else.",
        ),
    ] = None,
    within: Annotated[
        list[str] | None,
        typer.Option(
            "--within", "--intersect", metavar="VIEW", help="Keep what this view keeps. Repeatable: all."
        ),
    ] = None,
    per_label: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Of what is left, keep N images of each label, chosen at random; an image with several "
            "labels counts for each.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the random choice. [default: 0]")
    ] = None,
    workers: Workers = CORES,
    as_json: Json = False,
) -> None:
    """Make a view of the samples that match every option; without --name, list the views."""
    if seed is not None and per_label is None:
        raise UserError("--seed is that of a draw: give --per-label N, or leave --seed out")
    wanted = Filter(
        within=tuple(within or ()),
        remove=tuple(remove or ()),
        keep=() if keep is None else (keep,),
        where=tuple(where or ()),
        per_label=None if per_label is None else PerLabel(count=per_label, seed=seed or 0),
    )
    if name is None:
        if wanted != Filter():
            raise UserError(
                "a view needs a name: add --name, or leave the other options out to list the views"
            )
        _list(dataset, as_json=as_json)
        return
    with Meter(Console(stderr=True)) as meter, processes(workers) as map_tasks:
        report = filter_view(
            dataset,
            name,
            wanted,
            map_tasks=map_tasks,
            progress=lambda done, total: meter.tell("filtering units", done=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps({"path": dataset} | asdict(report), indent=2))
    else:
        _print(report, dataset, noun_of(open_store(dataset)))
    end_if_nothing(report.kept)


def _print(report: FilterReport, dataset: str, noun: str) -> None:
    typer.echo(f"view     {report.view} of {visible(dataset)}, root {report.root[:12]}")
    typer.echo(f"kept     {report.kept:,} of {several(report.samples, noun)}")
    for step in report.steps:
        null = f", {step.null:,} of them without a value" if step.null else ""
        typer.echo(f"dropped  {step.dropped:,} by {visible(step.step)}{null}")
    for listed in report.lists:
        _print_list(listed, noun)
    if report.drawn is not None:
        _print_draw(report.drawn, noun)
    if not report.kept:
        typer.echo("Nothing is kept: no view was written.")


def _print_list(listed: Matched, noun: str) -> None:
    path = visible(listed.path)
    if listed.by_file_name:
        matched = listed.lines - listed.unmatched
        typer.echo(
            f"by name  {matched:,} of {several(listed.lines, 'line')} of {path} name "
            f"{several(listed.samples, noun)}, by the last part of their paths"
            + (": some have the same name" if listed.samples > matched else "")
        )
    if listed.unmatched:
        typer.echo(
            f"careful  {listed.unmatched:,} of {several(listed.lines, 'line')} of {path} "
            f"name no sample: {', '.join(_brief(name) for name in listed.named)}"
            + (", …" if len(listed.named) < listed.unmatched else "")
            + (f"; the dataset has such as {_brief(listed.example)}" if listed.example else "")
        )


def _print_draw(drawn: Drawn, noun: str) -> None:
    typer.echo(f"labels   {drawn.labels:,}")
    if drawn.shared:
        typer.echo(f"careful  {several(drawn.shared, 'draw')} took what another label has drawn, too")
    if drawn.short:
        named = [f"{_brief(name)} ({count})" for name, count in list(drawn.short.items())[:_SHORT_NAMED]]
        typer.echo(
            f"careful  {several(len(drawn.short), 'label')} with fewer {noun}s, all of which are kept: "
            + ", ".join(named)
            + (", …" if len(named) < len(drawn.short) else "")
        )


def _brief(name: str) -> str:
    return visible(name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…")


def _list(dataset: str, *, as_json: bool) -> None:
    latest = open_dataset(dataset).root
    views = [read_view(dataset, name, root=None) for name in view_names(dataset)]
    if as_json:
        rows = [
            {
                "name": view.name,
                "root": view.root,
                "latest": view.root == latest,
                "samples": int(view.slots.sum()),
                "kept": int(view.kept.sum()),
                "sha256": view.digest,
            }
            for view in views
        ]
        typer.echo(json.dumps({"path": dataset, "root": latest, "views": rows}, indent=2))
        return
    if not views:
        typer.echo(f"{visible(dataset)} has no views: make one with `ingest view` or `ingest dedup`")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("view", style="bold")
    for column in ("kept", "of"):
        table.add_column(column, justify="right")
    table.add_column("root")
    for view in views:
        told = view.root[:12] + ("" if view.root == latest else ", not the latest")
        table.add_row(view.name, f"{view.kept.sum():,}", f"{view.slots.sum():,}", told)
    Console().print(table)
