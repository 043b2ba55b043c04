"""`ingest card`: what a dataset is made of, as Markdown."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import UserError
from ingest.commands.options import DatasetFolder
from ingest.commands.stats import counted
from ingest.report.card import dataset_card
from ingest.store.open import name_of
from ingest.store.posix import PosixStore


def card(
    dataset: DatasetFolder,
    output: Annotated[
        Path | None, typer.Option(help="The file to write, such as README.md. [default: print it]")
    ] = None,
) -> None:
    """Write a dataset's card: sources, opt-outs, counts, settings, and how to request removal."""
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output {output} cannot be a file: name one in a folder that exists")
    text = dataset_card(dataset, counted(dataset), name=name_of(dataset))
    if output is None:
        typer.echo(text, nl=False)
    else:
        PosixStore(output.parent).replace(output.name, text.encode())
