"""`ingest show`: a gallery of what was kept, and what was not and why."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import UserError
from cluster.wording import in_bytes, several, visible
from ingest.commands.options import DatasetFolder
from ingest.commands.stats import counted
from ingest.dataset.open import open_dataset
from ingest.store.open import name_of
from ingest.store.posix import PosixStore


def show(
    dataset: DatasetFolder,
    output: Annotated[
        Path | None, typer.Option(help="The page to write. [default: the dataset's name + .html]")
    ] = None,
    view: Annotated[
        str | None, typer.Option(help="Show the images of this view, and the duplicates that it leaves out.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, max=2000, help="How many images to show.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the choice of images.")] = 0,
) -> None:
    """Write a self-contained HTML page about a dataset: images, sizes, formats, and what was not kept."""
    from ingest.report import gallery

    page = Path(f"{name_of(dataset)}.html") if output is None else output
    if page.is_dir() or not page.parent.is_dir():
        wrong = "is a folder" if page.is_dir() else f"would lie in {page.parent}, and there is no such folder"
        raise UserError(f"--output {page} {wrong}: name a file in a folder that exists")
    seen = open_dataset(dataset, view=view)
    found = counted(dataset)
    text, shown = gallery.show(dataset, found, view=view, samples=samples, seed=seed)
    PosixStore(page.parent).replace(page.name, text.encode())
    images = several(shown, found.noun)
    typer.echo(f"{visible(str(page))} shows {images} of {len(seen):,} ({in_bytes(len(text))})")
    if damaged := min(samples, len(seen)) - shown:
        typer.echo(
            f"{several(damaged, found.noun)} could not be shown: `ingest verify` says what is damaged."
        )
