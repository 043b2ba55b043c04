"""`ingest verify`: is everything that was sealed still there and unharmed?"""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from cluster.errors import UserError
from cluster.host import CORES
from cluster.wording import several, visible
from ingest.commands.options import DatasetFolder, Json, Workers
from ingest.dataset.plan_record import noun_of
from ingest.dataset.verify import (
    DECODE_MB,
    DECODE_SECONDS,
    Damage,
    Level,
    read_seal,
    verify_root,
    verify_units,
)
from ingest.progress.meter import Meter
from ingest.store.open import open_store


def verify(
    dataset: DatasetFolder,
    level: Annotated[
        str, typer.Option(help="names, sizes, sha or decode; each includes the checks before it.")
    ] = "sha",
    workers: Workers = CORES,
    *,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="At level decode: CPU time that one image or clip may take.")
    ] = DECODE_SECONDS,
    memory_mb: Annotated[
        int, typer.Option(min=64, help="At level decode: memory that one image or clip may take, MiB.")
    ] = DECODE_MB,
    as_json: Json = False,
) -> None:
    """Check that a dataset is intact, and name everything that is damaged; exit with 1 if anything is."""
    if level.upper() not in Level.__members__:
        raise UserError(f"--level {level} is not a level: use names, sizes, sha or decode")
    chosen = Level[level.upper()]
    seal, damages = read_seal(dataset)
    images, noun = 0, noun_of(open_store(dataset))
    if seal is not None:
        if chosen >= Level.SHA:
            damages += verify_root(dataset, seal)
        with Meter(Console(stderr=True)) as meter:
            units = verify_units(dataset, seal, chosen, workers=workers, seconds=seconds, memory_mb=memory_mb)
            for done, report in enumerate(units, 1):
                damages += report.damages
                images += report.images
                figures = [several(images, noun), f"{len(damages):,} damaged"]
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
        _print_verdict(dataset, damages, chosen, several(images, noun))
    if damages:
        raise typer.Exit(1)


def _print_verdict(dataset: str, damages: list[Damage], level: Level, images: str) -> None:
    for damage in damages:
        typer.echo(visible(damage.sentence))
    looked = f" ({images} read)" if level >= Level.SHA else ""
    verdict = f"damaged: {several(len(damages), 'thing')}" if damages else "whole"
    typer.echo(f"{visible(str(dataset))} is {verdict}, at level {level.name.lower()}{looked}")
