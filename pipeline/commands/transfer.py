"""`submit export`, and a command for each evaluation: take a trunk out of a run, and score it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.run.trust import CHECKPOINTS, refuse_untrusted
from cluster.site import users_site
from cluster.typed_yaml import load_recipe
from pipeline.commands.options import Device, Json, Overrides, Trust
from pipeline.transfer.evaluations import EVALUATIONS

Trunk = Annotated[Path, typer.Argument(help="The folder of an exported trunk.")]
Train = Annotated[str, typer.Option("--train", help="The sealed dataset to learn the labels from.")]
Test = Annotated[str, typer.Option("--test", help="The sealed dataset to be scored on.")]
TrainView = Annotated[str | None, typer.Option("--train-view", help="A view of --train.")]
TestView = Annotated[str | None, typer.Option("--test-view", help="A view of --test, which may be the same.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that read images.")]


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints/step-….")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    which: Annotated[
        Literal["student", "teacher"], typer.Option("--which", help="The trunk that learns, or its teacher.")
    ] = "student",
    trust: Trust = False,
) -> None:
    """Write a run's trunk as safetensors with a model card."""
    from pipeline.trunks.export import export_trunk

    if run.is_dir() and not trust:
        a_checkpoint = (run / "manifest.json").is_file()
        refuse_untrusted(run, (".",) if a_checkpoint else CHECKPOINTS, groups=users_site().trusted_groups)
    spec = export_trunk(run, out, which=which)
    whose = f"the {spec.provenance['which']}'s " if "which" in spec.provenance else ""
    typer.echo(f"{out}: {whose}{spec.architecture.name}, {spec.feature_dim} features")


def evaluation_command(name: str) -> Callable[..., None]:
    """The command of an evaluation: `submit knn`."""
    evaluation = EVALUATIONS[name]

    def command(  # noqa: PLR0917 -- typer passes by name
        trunk: Trunk,
        train: Train,
        test: Test,
        overrides: Overrides = None,
        train_view: TrainView = None,
        test_view: TestView = None,
        recipe_name: Annotated[str, typer.Option("--recipe")] = name,
        workers: Workers = 2,
        device: Device = "auto",
        as_json: Json = False,
    ) -> None:
        from ingest.dataset.open import open_dataset
        from pipeline.stages.machine import pick_device
        from pipeline.transfer.features import extract_from_files

        recipe = load_recipe(evaluation.recipe, recipe_name, overrides, kind="transfer")
        where = pick_device(device)
        features = extract_from_files(
            trunk,
            open_dataset(train, view=train_view),
            open_dataset(test, view=test_view),
            workers=workers,
            device=where,
        )
        _print_scores(evaluation.score(*features, recipe, device=where).metrics(), as_json=as_json)

    command.__doc__ = evaluation.about
    return command


def _print_scores(scores: dict[str, float], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(scores))
        return
    for name, value in scores.items():
        typer.echo(f"{name:>24}  {value:.6g}")
