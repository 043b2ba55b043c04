"""`submit finetune`: train a trunk further, with a classifier on it, on labelled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import UserError
from cluster.site import site_for_jobs
from cluster.typed_yaml import load_recipe
from pipeline.commands.options import (
    Cluster,
    DryRun,
    ExecutorOption,
    Follow,
    NamedRun,
    Nodes,
    Overrides,
    Ranks,
    Trust,
    Wait,
)
from pipeline.commands.pretrain import place_words, start_training
from pipeline.recipe.pretrain import PretrainRecipe


def finetune(  # noqa: PLR0917 -- typer passes by name
    trunk: Annotated[
        Path,
        typer.Argument(
            help="The folder of an exported trunk; or a file of other weights, with trunk.name=…."
        ),
    ],
    train: Annotated[str, typer.Option("--train", help="The sealed dataset to learn the labels from.")],
    overrides: Overrides = None,
    test: Annotated[
        str | None, typer.Option("--test", help="The sealed dataset that the classifier is tested on.")
    ] = None,
    train_view: Annotated[str | None, typer.Option("--train-view", help="A view of --train.")] = None,
    test_view: Annotated[str | None, typer.Option("--test-view", help="A view of --test.")] = None,
    recipe_name: Annotated[
        str, typer.Option("--recipe", help="A .yaml file, or the name of a shipped recipe.")
    ] = "finetune_seer_384",
    nodes: Nodes = None,
    ranks: Ranks = None,
    run_name: NamedRun = None,
    executor: ExecutorOption = None,
    cluster: Cluster = "default",
    dry_run: DryRun = False,
    wait: Wait = False,
    follow: Follow = False,
    trust: Trust = False,
) -> None:
    """Fine-tune a trunk on labelled images. RUN/classifier is what comes of it, RUN/test.json how good it is.

    The same command with the same --run goes on where the run was stopped. With trunk.init_from=null the
    trunk starts from scratch, to compare with.
    """
    from pipeline.trunks.files import start_of

    if test_view is not None and test is None:
        raise UserError("--test-view is a view of --test: give that, too")
    # What is not said stays as the recipe has it.
    said = {"data.view": train_view, "test.root": test, "test.view": test_view}
    values: dict[str, Any] = {"data.root": train} | {k: v for k, v in said.items() if v is not None}
    if trunk.is_dir():
        start = start_of(trunk)
        values["trunk"] = start.trunk.model_dump(mode="json")
        values |= {f"data.{key}": colours for key, colours in start.colours.items()}
    else:
        values["trunk.init_from"] = str(trunk)
    words = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    words += [*(overrides or []), *place_words(nodes=nodes, ranks=ranks, run_name=run_name)]
    recipe = load_recipe(PretrainRecipe, recipe_name, words, kind="transfer")
    if not recipe.method.supervised:
        raise UserError(
            f"{recipe_name} trains by {recipe.method.name}, without labels: `submit pretrain` does that; "
            "fine-tuning has method.name: classification"
        )
    stem = f"{Path(recipe_name).stem}-{trunk.resolve().name}"
    site = site_for_jobs(cluster)
    start_training(recipe, stem, site, executor, dry_run=dry_run, wait=wait, follow=follow, trust=trust)
