"""`submit hashtags`: what is written about a dataset's images becomes tags to pretrain on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import UserError
from cluster.typed_yaml import load_recipe
from pipeline.commands.options import Json, Overrides
from pipeline.recipe.stages import HashtagsRecipe


def hashtags(  # noqa: PLR0917 -- typer passes by name
    dataset: Annotated[str, typer.Argument(help="A sealed dataset whose images have captions or hashtags.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    overrides: Overrides = None,
    recipe_name: Annotated[str, typer.Option("--recipe")] = "hashtags",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that read captions.")] = 2,
    as_json: Json = False,
) -> None:
    """Find the nouns in captions, and write a vocabulary and the tags of each image, for `submit pretrain
    data.tags=FOLDER` with method.name: classification. FOLDER/hashtags.html shows them.
    """
    from cluster.map.processes import processes
    from ingest.dataset.open import open_dataset
    from pipeline.data.tags import FILE
    from pipeline.hashtags.make_tags import make_tags
    from pipeline.report.tags import write_tags_page

    recipe = load_recipe(HashtagsRecipe, recipe_name, overrides, kind="transfer")
    if (folder / FILE).exists():
        raise UserError(f"{folder} already has tags, which trainings may use: name another folder")
    opened = open_dataset(dataset, view=recipe.view)
    with processes(workers) as map_tasks:
        found = make_tags(opened, recipe, folder, map_tasks=map_tasks)
    write_tags_page(opened, folder)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(
        f"{folder}: {found['tags']:,} tags of {found['tagged']:,} images, {found['tagged_share']:.1%} of "
        f"all, {found['tags_per_tagged_image']:.2f} each; see {folder / 'hashtags.html'}"
    )
