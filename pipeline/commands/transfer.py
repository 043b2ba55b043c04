"""`submit export`, and a command for each evaluation: take a trunk out of a run, and score it; or a
classifier, and test it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.errors import UserError
from cluster.run.trust import CHECKPOINTS, refuse_untrusted
from cluster.site import users_site
from cluster.typed_yaml import load_recipe
from pipeline.commands.options import Device, Json, Overrides, Runs, Trust
from pipeline.commands.runs import no_run
from pipeline.recipe.data import Interpolation
from pipeline.recipe.stages import Layer, Windows
from pipeline.transfer.evaluations import EVALUATIONS

Trunk = Annotated[Path, typer.Argument(help="The folder of an exported trunk.")]
Train = Annotated[str, typer.Option("--train", help="The labelled dataset to learn from.")]
Test = Annotated[str, typer.Option("--test", help="The labelled dataset to test on.")]
TrainView = Annotated[str | None, typer.Option("--train-view", help="A view of --train.")]
TestView = Annotated[str | None, typer.Option("--test-view", help="A view of --test.")]
WindowCount = Annotated[
    int, typer.Option("--windows", min=1, help="For videos: how many windows of each to use.")
]
Each = Annotated[
    bool, typer.Option("--each/--mean", help="For videos: the features of each window, or their mean.")
]
LayerName = Annotated[
    Layer | None,
    typer.Option("--layer", help="For AVID's trunks: pool the output of this stage instead of the last."),
]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that load the data.")]


def export(  # noqa: PLR0917 -- typer passes by name
    run: Annotated[
        Path,
        typer.Argument(
            help="The run's name or folder, or one of its checkpoints/step-…; with --format, also a trunk."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    which: Annotated[
        Literal["student", "teacher", "audio"] | None,
        typer.Option(
            "--which",
            help="The trained trunk; its teacher (of a classifier: averaged weights); or AVID's for sound.",
        ),
    ] = None,
    interpolation: Annotated[
        Interpolation | None,
        typer.Option(
            "--interpolation",
            help="How images are resized for it; by default as in the run's recipe.",
        ),
    ] = None,
    classifier: Annotated[
        bool, typer.Option("--classifier", help="Export the trunk with its head, of a run with labels.")
    ] = False,
    format_: Annotated[
        Literal["timm", "transformers", "onnx"] | None,
        typer.Option("--format", help="Write a folder for this library in place of ours."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite files that did not come from the same run.")
    ] = False,
    folder: Runs = Path("runs"),
    trust: Trust = False,
) -> None:
    """Write a run's trunk, or its classifier, as safetensors with a model card, or for another library."""
    from pipeline.trunks.export import convert_trunk, export_classifier, export_trunk

    if classifier and format_ is not None:
        raise UserError("a classifier is a checkpoint of timm's as it is: leave --format out")
    if format_ is not None and (run / "trunk.json").is_file():
        if which is not None or interpolation is not None:
            raise UserError(
                f"{run} is a trunk that was exported already: leave --which and --interpolation out"
            )
        spec = convert_trunk(run, out, format_, force=force)
        typer.echo(f"{out}: {spec.architecture.name} for {format_}, {spec.feature_dim} features")
        return
    found = next((path for path in (run, folder / run) if path.is_dir()), None)
    if found is None:
        raise no_run(run, folder)
    run = found
    if not trust:
        a_checkpoint = (run / "manifest.json").is_file()
        refuse_untrusted(run, (".",) if a_checkpoint else CHECKPOINTS, groups=users_site().trusted_groups)
    if classifier:
        if which == "audio":
            raise UserError("a classifier has no trunk for sound: leave --which audio out")
        made = export_classifier(run, out, which=which, interpolation=interpolation, force=force)
        typer.echo(f"{out}: a {made.architecture.name} with {len(made.classes)} classes")
        return
    spec = export_trunk(
        run, out, which=which or "student", interpolation=interpolation, format_=format_, force=force
    )
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
        windows: WindowCount = 10,
        each: Each = evaluation.windows == "always",
        layer: LayerName = None,
        workers: Workers = 2,
        device: Device = "auto",
        as_json: Json = False,
    ) -> None:
        from rich.console import Console

        from cluster.rank.torch_dist import choose_device
        from ingest.dataset.open import open_dataset
        from ingest.progress.meter import Meter
        from pipeline.transfer.extract import extract_from_files

        recipe = load_recipe(evaluation.recipe, recipe_name, overrides, kind="transfer")
        where = choose_device(device)
        learnt, asked = open_dataset(train, view=train_view), open_dataset(test, view=test_view)
        evaluation.refuse(recipe, len(learnt))
        with tempfile.TemporaryDirectory(prefix="submit-features-") as folder:  # in TMPDIR
            with Meter(Console(stderr=True)) as meter:
                features = extract_from_files(
                    trunk,
                    learnt,
                    asked,
                    Path(folder),
                    workers=workers,
                    device=where,
                    several_labels=evaluation.several_labels,
                    videos=Windows(windows=windows, each=each, layer=layer, pooling=evaluation.pooling),
                    progress=lambda what, done, total: meter.tell(
                        f"features of {what}", done=done, total=total
                    ),
                )
            scores = evaluation.score(*features, recipe, device=where)
        _print_scores(scores.metrics(), as_json=as_json)

    command.__doc__ = evaluation.about
    return command


def predict(  # noqa: PLR0917 -- typer passes by name
    classifier: Annotated[Path, typer.Argument(help="The folder of an exported classifier.")],
    test: Test,
    overrides: Overrides = None,
    test_view: TestView = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", dir_okay=False, help="A Parquet file to write, with one row per image."),
    ] = None,
    recipe_name: Annotated[str, typer.Option("--recipe")] = "predict",
    workers: Workers = 2,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Test a classifier on a labelled dataset."""
    from cluster.rank.torch_dist import choose_device
    from ingest.dataset.open import open_dataset
    from pipeline.recipe.transfer import Predict
    from pipeline.transfer.predict import predict, summarise, write_predictions
    from pipeline.trunks.classifier import load_classifier

    recipe = load_recipe(Predict, recipe_name, overrides, kind="transfer")
    where = choose_device(device)
    predictions = predict(
        load_classifier(classifier).to(where),
        open_dataset(test, view=test_view),
        recipe,
        workers=workers,
        device=where,
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(predictions, output)
    _print_scores(summarise(predictions), as_json=as_json)


def cross_modal(  # noqa: PLR0917 -- typer passes by name
    run: Annotated[Path, typer.Argument(help="The folder of a run of AVID.")],
    data: Annotated[str, typer.Option("--data", help="A sealed dataset of labelled videos.")],
    view: Annotated[str | None, typer.Option("--view", help="A view of --data.")] = None,
    windows: WindowCount = 10,
    workers: Workers = 2,
    device: Device = "auto",
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Score AVID by how often a video's sound is the nearest of all to its picture, and vice versa."""
    from cluster.rank.torch_dist import choose_device
    from ingest.dataset.open import open_dataset
    from pipeline.transfer.cross_modal import cross_modal as score
    from pipeline.transfer.embed import embed_videos
    from pipeline.trunks.embedder import load_embedder

    if run.is_dir() and not trust:
        refuse_untrusted(run, CHECKPOINTS, groups=users_site().trusted_groups)
    where = choose_device(device)
    dataset = open_dataset(data, view=view)
    video, audio = embed_videos(load_embedder(run), dataset, windows=windows, workers=workers, device=where)
    _print_scores(score(video.x, audio.x, device=where).metrics(), as_json=as_json)


def _print_scores(scores: dict[str, float], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(scores))
        return
    for name, value in scores.items():
        typer.echo(f"{name:>24}  {value:.6g}")
