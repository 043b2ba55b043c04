"""`submit export|knn|linear`: take a trunk out of a run, and score it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.typed_yaml import load_recipe
from pipeline.commands.options import Device, Json, Overrides
from pipeline.recipe.transfer import KnnRecipe, LinearRecipe

Trunk = Annotated[Path, typer.Argument(help="The folder of an exported trunk.")]
Train = Annotated[str, typer.Option("--train", help="The sealed dataset to learn the labels from.")]
Test = Annotated[str, typer.Option("--test", help="The sealed dataset to be scored on.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that read images.")]


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints/step-….")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    which: Annotated[
        Literal["student", "teacher"], typer.Option("--which", help="The trunk that learns, or its teacher.")
    ] = "student",
) -> None:
    """Write a run's trunk as safetensors with a model card."""
    from pipeline.trunks.export import export_trunk

    spec = export_trunk(run, out, which=which)
    whose = f"the {spec.provenance['which']}'s " if "which" in spec.provenance else ""
    typer.echo(f"{out}: {whose}{spec.architecture.name}, {spec.feature_dim} features")


def knn(  # noqa: PLR0917 -- typer passes by name
    trunk: Trunk,
    train: Train,
    test: Test,
    overrides: Overrides = None,
    recipe_name: Annotated[str, typer.Option("--recipe")] = "knn",
    workers: Workers = 2,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a trunk by weighted nearest neighbours."""
    from pipeline.stages.machine import pick_device
    from pipeline.transfer.knn import knn_from_files

    recipe = load_recipe(KnnRecipe, recipe_name, overrides, kind="transfer")
    scores = knn_from_files(trunk, train, test, recipe, workers=workers, device=pick_device(device))
    _print_scores(scores.metrics(), as_json=as_json)


def linear(  # noqa: PLR0917 -- typer passes by name
    trunk: Trunk,
    train: Train,
    test: Test,
    overrides: Overrides = None,
    recipe_name: Annotated[str, typer.Option("--recipe")] = "linear",
    workers: Workers = 2,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a trunk by a linear classifier on its features."""
    from pipeline.stages.machine import pick_device
    from pipeline.transfer.linear import linear_from_files

    recipe = load_recipe(LinearRecipe, recipe_name, overrides, kind="transfer")
    scores = linear_from_files(trunk, train, test, recipe, workers=workers, device=pick_device(device))
    _print_scores(scores.metrics(), as_json=as_json)


def _print_scores(scores: dict[str, float], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(scores))
        return
    for name, value in scores.items():
        typer.echo(f"{name:>24}  {value:.6g}")
