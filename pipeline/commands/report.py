"""`submit report`: the page of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.executors import Look
from cluster.job import DeviceName
from cluster.run.trust import CHECKPOINTS, refuse_untrusted
from cluster.site import users_site
from pipeline.commands.options import RunName, Runs, Trust
from pipeline.commands.runs import find_run
from pipeline.train.look import UNREADABLE, look_at, name_in


def report(  # noqa: PLR0917 -- typer passes by name
    run: RunName,
    output: Annotated[Path, typer.Option("--output", dir_okay=False, help="The page to write.")] = Path(
        "report.html"
    ),
    images: Annotated[
        int,
        typer.Option(
            "--images",
            min=0,
            help="How many images to draw for neighbours and prototypes; with 0 no checkpoint is read.",
        ),
    ] = 2_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    device: Annotated[
        DeviceName, typer.Option("--device", help="Where to compute; the run may be using the GPU.")
    ] = "cpu",
    folder: Runs = Path("runs"),
    trust: Trust = False,
) -> None:
    """Write a page about a run, which needs no labels: curves, crops, prototypes and neighbours, by its
    newest checkpoint. The run may still be going on.
    """
    from cluster.rank.torch_dist import choose_device
    from pipeline.report.run_page import run_page

    found = find_run(run, folder)
    if images and not trust:
        refuse_untrusted(
            found.path,
            CHECKPOINTS,
            groups=users_site().trusted_groups,
            remedy="--images 0 leaves the checkpoint alone, and --trust reads it all the same",
        )
    known = look_at(found, name_in(folder, found), Look([found]).status)
    if known["state"] == UNREADABLE:
        raise UserError(known["why"])
    page = run_page(found.path, known, images=images, seed=seed, device=choose_device(device))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page)
    typer.echo(f"page: {output}")
