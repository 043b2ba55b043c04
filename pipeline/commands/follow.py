"""`submit follow`: a run told to MLflow or to W&B."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.executors import status_of
from cluster.run.status import explain
from pipeline.commands.options import RunName, Runs
from pipeline.commands.runs import find_run


def follow(
    run: RunName,
    to: Annotated[Literal["mlflow", "wandb"], typer.Option("--to", help="Which tracker to send it to.")],
    project: Annotated[
        str, typer.Option("--project", help="MLflow's experiment, or W&B's project.")
    ] = "submit",
    once: Annotated[
        bool, typer.Option("--once", help="Send what is there now, and do not wait for more.")
    ] = False,
    folder: Runs = Path("runs"),
) -> None:
    """Send the recipe and the numbers of a run to MLflow or W&B until it ends, from where an earlier
    call stopped. The run does not know of it: its files are read from outside.
    """
    from pipeline.follow.follow import follow as follow_run
    from pipeline.follow.to_mlflow import Mlflow
    from pipeline.follow.to_wandb import Wandb

    found = find_run(run, folder)
    tracker = Mlflow(project) if to == "mlflow" else Wandb(project)
    told = follow_run(found, tracker, status=status_of, why=explain, once=once)
    typer.echo(f"{told} new {'row' if told == 1 else 'rows'} sent to {tracker.place}")
