"""The `submit` command: train, evaluate, and look after runs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from cluster.doctor import doctor_report, doctor_table
from cluster.errors import UserError
from cluster.job import PREEMPTED_EXIT_CODE, State
from cluster.local import OPENMP_SETTINGS, LocalExecutor
from cluster.runs import RunFolder, Status, explain, list_runs
from pipeline.recipe import KnnRecipe, LinearRecipe, PretrainRecipe, load_recipe
from pipeline.terminal import ProgressLine

DEFAULT_RECIPE = "seer_regnety_256gf"
CANCEL_PATIENCE = 60.0  # seconds


class Commands(TyperGroup):
    """Ends a command on a mistake of the user, or on Ctrl-C, with one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"submit: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("submit: interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="submit",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted changes, such as optim.lr=0.3.")
]
Runs = Annotated[Path, typer.Option("--folder", help="Where the runs are.")]
Run = Annotated[str, typer.Argument(help="A run's name, or its folder.")]
Trunk = Annotated[Path, typer.Argument(help="The folder of an exported trunk.")]
Train = Annotated[str, typer.Option("--train", help="The sealed dataset to learn the labels from.")]
Test = Annotated[str, typer.Option("--test", help="The sealed dataset to be scored on.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that read images.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train trunks on images nobody curated, and see how well they transfer."""


@app.command()
def pretrain(  # noqa: PLR0917 -- typer passes by name
    overrides: Overrides = None,
    recipe_name: Annotated[
        str | None, typer.Option("--recipe", help="A .yaml file, or the name of a shipped recipe.")
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Machines.")] = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Processes per machine; by default one per GPU.")
    ] = None,
    run_name: Annotated[
        str | None, typer.Option("--run", help="The run's name; an existing one is gone on with.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be started, and stop.")] = False,
) -> None:
    """Pretrain a trunk. The same command with the same --run goes on where the run was stopped."""
    from pipeline.stages import pretrain_job, resources_for
    from pipeline.train.checkpoint import latest, step_of
    from pipeline.train.provenance import check_same_recipe, pin_dataset, to_yaml

    if recipe_name is None:
        recipe_name = DEFAULT_RECIPE
        typer.echo(f"recipe: {recipe_name}, the default; --recipe chooses another")
    words = [*(overrides or [])]
    words += [f"run.nodes={nodes}"] if nodes is not None else []
    words += [f"run.ranks_per_node={ranks}"] if ranks is not None else []
    words += [f"run.name={json.dumps(run_name)}"] if run_name is not None else []
    recipe = load_recipe(PretrainRecipe, recipe_name, words, kind="pretrain")
    name = recipe.run.name or f"{Path(recipe_name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": name})})
    folder = Path(recipe.run.folder) / name
    resources = resources_for(recipe.run)
    if resources.nodes > 1:
        raise UserError(
            f"{resources.nodes} nodes need SLURM or Ray, which --executor slurm or ray will choose once "
            "they are there: on this machine use --nodes 1, and --ranks for several processes"
        )
    if not dry_run or (folder / "recipe.yaml").is_file():  # a dry run needs no data
        recipe = pin_dataset(recipe, folder)
    check_same_recipe(recipe, folder)
    job = pretrain_job(recipe, folder, resources)
    checkpoint = latest(folder)
    start = "from the start" if checkpoint is None else f"from step {step_of(checkpoint)}"
    per_rank = "1 GPU" if resources.gpus_per_rank else "the CPU"
    typer.echo(to_yaml(recipe))
    typer.echo(
        f"{'would run' if dry_run else 'run'} {folder} {start}, on this machine: "
        f"{resources.ranks} ranks, each on {per_rank}"
    )
    if dry_run:
        return
    typer.echo(f"to stop: Ctrl-C; to go on: the same command with --run {name}")
    with contextlib.closing(ProgressLine(sys.stdout)) as progress:
        state = LocalExecutor(stream=progress).submit(job).wait()
    _close(RunFolder(folder), state)


def _close(run: RunFolder, state: State) -> None:
    """Tell how a run ended, and end the command alike."""
    status = run.status()
    if status.failure is not None and status.failure.user_error:
        raise UserError(status.failure.message)
    if state is State.COMPLETED:
        typer.echo(f"completed: {run.path}")
        return
    typer.echo(f"submit: {explain(status)}", err=True)
    raise typer.Exit(PREEMPTED_EXIT_CODE if state is State.PREEMPTED else 1)


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(help="A run's name or folder; all runs without it.")] = None,
    folder: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Say where runs are and why."""
    runs = list_runs(folder) if run is None else [_find(run, folder)]
    found = [(each, each.status(), _progress(each)) for each in runs]
    if as_json:
        values = [
            {"run": each.path.name, "folder": str(each.path), **state.to_json(), "progress": progress}
            for each, state, progress in found
        ]
        typer.echo(json.dumps(values if run is None else values[0], indent=2))
    elif not found:
        typer.echo(f"no runs in {folder}; `submit pretrain` starts one")
    else:
        Console().print(_status_table(found))
    if run is not None and not as_json:
        typer.echo(explain(found[0][1]))


def _status_table(found: list[tuple[RunFolder, Status, dict[str, Any]]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "step", "loss", "images/s", "left", "ranks", "attempt"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right")
    for run, state, progress in found:
        running = state.state is State.RUNNING
        loss, rate = progress.get("loss"), progress.get("images_per_second")
        table.add_row(
            run.path.name,
            str(state.state),
            f"{progress['step']}/{progress['total_steps']}" if progress else "",
            "" if loss is None else f"{loss:.4f}",
            f"{rate:.0f}" if running and rate is not None else "",
            f"{progress['seconds_left'] / 60:.0f} min" if running and progress else "",
            str(state.ranks),
            str(state.attempt),
        )
    return table


def _progress(run: RunFolder) -> dict[str, Any]:
    """What the first rank said last; nothing if it has not said anything yet."""
    path = run.path / "progress.json"
    progress: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return progress


def _find(run: str, folder: Path) -> RunFolder:
    return RunFolder.open(Path(run) if (Path(run) / "status.json").is_file() else folder / run)


@app.command()
def logs(
    run: Run,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Whose log.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    folder: Runs = Path("runs"),
) -> None:
    """Print the log of a rank."""
    found = _find(run, folder)
    if not found.log(rank).is_file():
        raise UserError(
            f"{found.path} has no log of rank {rank}: it has ranks 0 to {found.read_status().ranks - 1}"
        )
    if follow:
        for text in found.follow(rank):
            typer.echo(text, nl=False)
    else:
        typer.echo(found.log(rank).read_text(errors="replace"), nl=False)


@app.command()
def cancel(run: Run, folder: Runs = Path("runs")) -> None:
    """End a run; it saves a checkpoint first."""
    found = _find(run, folder)
    found.cancel()
    deadline = time.monotonic() + CANCEL_PATIENCE
    while not found.status().state.ended and time.monotonic() < deadline:
        time.sleep(0.2)
    state = found.status().state
    waits = "" if state.ended else "; it was asked to end, and has not yet"
    typer.echo(f"{found.path.name} is {state}{waits}")


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="Where runs would be written.")] = Path(),
    as_json: Json = False,
) -> None:
    """Say what is installed and active, and how to mend what is not."""
    from ingest.doctor import image_checks

    checks = [*image_checks(), *doctor_report(folder)]
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        Console().print(doctor_table(checks))
    if any(check.required and check.status == "missing" for check in checks):
        raise typer.Exit(1)


@app.command()
def dag(
    name: Annotated[str, typer.Argument(help="A .yaml file, or the name of a shipped graph.")],
    overrides: Overrides = None,
) -> None:
    """Run the stages of a graph that have not run yet."""
    from pipeline.dag import run_dag
    from pipeline.stages import KINDS

    with contextlib.closing(ProgressLine(sys.stdout)) as progress:

        def say(text: str) -> None:
            progress.write(f"{text}\n")
            progress.flush()

        run_dag(name, overrides or [], LocalExecutor(stream=progress), kinds=KINDS, say=say)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints/step-….")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Write a run's trunk as safetensors with a model card."""
    from pipeline.export import export_trunk

    spec = export_trunk(run, out)
    typer.echo(f"{out}: {spec.architecture.name}, {spec.feature_dim} features")


@app.command()
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
    from pipeline.stages import pick_device
    from pipeline.transfer.knn import knn_from_files

    recipe = load_recipe(KnnRecipe, recipe_name, overrides, kind="transfer")
    scores = knn_from_files(trunk, train, test, recipe, workers=workers, device=pick_device(device))
    _print_scores(scores.metrics(), as_json=as_json)


@app.command()
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
    from pipeline.stages import pick_device
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


def main() -> None:
    """The console script. `--debug` may stand anywhere on the line."""
    for name, value in OPENMP_SETTINGS.items():
        os.environ.setdefault(name, value)  # read when torch is imported, which no command has done yet
    logging.basicConfig(format="%(asctime)s %(message)s")
    for floor in ("cluster", "ingest", "pipeline"):
        logging.getLogger(floor).setLevel(logging.INFO)
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    app(arguments, prog_name="submit")
