"""`submit init-site`: a site file, from what SLURM says of itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import UserError
from cluster.site import load_site
from pipeline.commands.preflight import preflight as look_at_nodes

TRIED_ON = 2  # nodes: links are between two


def init_site(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("site.yaml"),
    partition: Annotated[
        str | None,
        typer.Option("--partition", help="The partition for training; by default the one with most GPUs."),
    ] = None,
    preflight: Annotated[bool, typer.Option("--preflight", help="Check two of its nodes with it.")] = False,
) -> None:
    """Write a site file from what SLURM says about its partitions, nodes and limits, for you to edit."""
    from cluster.slurm.site_file import site_file

    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"a site file ends in .yaml, and {output} does not")
    if shutil.which("sinfo") is None:
        raise UserError("there is no SLURM here to ask: run it where `sinfo` is, such as on a login node")
    text, nodes = site_file(partition=partition)
    try:
        with output.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{output} is there already: remove it, or write another by --output") from None
    load_site(str(output))
    typer.echo(f"{output} is for partition {nodes.partition}; read it, and fill in what SLURM does not know")
    tried = min(TRIED_ON, nodes.count)
    if preflight:
        look_at_nodes(nodes=tried, cluster=str(output))
    else:
        typer.echo(f"to try it, run: submit preflight --nodes {tried} --cluster {output}")
