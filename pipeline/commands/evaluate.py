"""`submit evaluate|schedule`: evaluate the checkpoints of a run that are new, now or on a timetable."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import UserError
from cluster.run.trust import CHECKPOINTS, refuse_untrusted
from cluster.site import load_site, site_for_jobs
from pipeline.commands.dag import run_on
from pipeline.commands.options import Cluster, Json, Overrides, RunName, Runs, StagesExecutor, Trust

if TYPE_CHECKING:
    from pipeline.dag.recipe import DagRecipe
    from pipeline.dag.stage import Stage

Graph = Annotated[str, typer.Option("--dag", help="The graph to run; its stage `checkpoint` is filled in.")]


Newest = Annotated[bool, typer.Option("--newest", help="Only the newest checkpoint.")]
StepsApart = Annotated[
    int | None, typer.Option("--steps-apart", min=1, help="Only checkpoints at least this many steps apart.")
]
GpuHours = Annotated[
    float | None,
    typer.Option("--gpu-hours", min=0, help="The most GPU-hours that all evaluations of this run may take."),
]


def evaluate(  # noqa: PLR0917 -- typer passes by name
    run: RunName,
    overrides: Overrides = None,
    dag: Graph = "evals",
    newest: Newest = False,
    steps_apart: StepsApart = None,
    gpu_hours: GpuHours = None,
    folder: Runs = Path("runs"),
    executor: StagesExecutor = "local",
    cluster: Cluster = "default",
    trust: Trust = False,
) -> None:
    """Evaluate the checkpoints of a run that have not been evaluated yet; nothing runs twice."""
    from pipeline.checkpoint.files import newest_first, step_of
    from pipeline.commands.runs import find_run
    from pipeline.dag.stage import StopRequested
    from pipeline.stages.chosen import Choice

    if newest and steps_apart is not None:
        raise UserError("--newest takes one checkpoint, and --steps-apart several: leave one out")
    found, site = find_run(run, folder), site_for_jobs(cluster)
    if not trust:
        refuse_untrusted(found.path, CHECKPOINTS, groups=site.trusted_groups)
    # By a link such as latest/pretrain a checkpoint would have another key.
    checkpoints = newest_first(found.path.resolve() / "checkpoints")[::-1]
    if not checkpoints:
        typer.echo(f"{found.path} has no checkpoint yet")
    choice = Choice(run=found.path.resolve(), newest=newest, steps_apart=steps_apart, gpu_hours=gpu_hours)
    for checkpoint in checkpoints:
        choice.graphs[step_of(checkpoint)] = _graph(dag, overrides, checkpoint)
    failures = []
    for step in choice.steps():
        try:  # one that fails, or was removed just now, must not stand in the way of the newer ones
            if refusal := choice.refusal(step):
                typer.echo(f"step {step} is left out: {refusal}")
                continue
            typer.echo(f"step {step}")
            run_on(executor, *choice.graphs[step], site)
        except StopRequested:
            raise
        except UserError as error:
            failures.append(f"step {step}: {error}")
    told = "; ".join(failures)
    failures += sorted(sentence for sentence in choice.left_out if sentence not in told)
    if failures:
        raise UserError("; ".join(failures))


def _graph(dag: str, overrides: list[str] | None, checkpoint: Path) -> tuple[DagRecipe, list[Stage]]:
    """What is asked of a checkpoint, which need not be there yet.

    Raises:
        UserError: the graph or an override is wrong.
    """
    from pipeline.dag.graph import build_graph
    from pipeline.dag.recipe import load_dag
    from pipeline.stages.kinds import KINDS

    path = json.dumps(str(checkpoint))
    recipe = load_dag(dag, [*(overrides or []), f"stages.checkpoint.recipe.path={path}"])
    return recipe, build_graph(recipe, KINDS)


def schedule(  # noqa: PLR0917 -- typer passes by name
    what: Annotated[
        str,
        typer.Argument(
            metavar="DAG|list|remove", help="A graph to schedule, such as evals; or list; or remove."
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...|NAME", help="Changes to the graph; or the name of the schedule to remove."
        ),
    ] = None,
    every: Annotated[
        str | None, typer.Option("--every", help="When, as in cron: '0 2 * * *' is every night at two.")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option("--run", help="The name or folder of the run whose checkpoints are evaluated."),
    ] = None,
    newest: Newest = False,
    steps_apart: StepsApart = None,
    gpu_hours: GpuHours = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The schedule's name; by default DAG-RUN.")
    ] = None,
    folder: Runs = Path("runs"),
    executor: StagesExecutor = "slurm",
    cluster: Cluster = "default",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Evaluate a run's new checkpoints on a schedule: by scrontab, or by jobs that submit the next."""
    from cluster.slurm import schedule as timetable
    from pipeline.commands.runs import find_run

    schedules = folder / "schedules"
    if schedules.is_dir() and what not in ("list", "remove") and not trust:
        # What is fired lies there.
        refuse_untrusted(schedules, (), groups=load_site(cluster).trusted_groups)
    if what == "list":
        found = timetable.installed(schedules)
        if as_json:
            told = [{"name": each.name, "every": each.every, "fired_by": each.fired_by} for each in found]
            typer.echo(json.dumps(told))
            return
        for each in found:
            typer.echo(f"{each.name:<24} {each.every:<16} {each.fired_by:<9} {' '.join(each.command[3:])}")
        return
    if what == "remove":
        if not words or len(words) != 1:
            raise UserError(
                "name the schedule to remove: submit schedule remove NAME; `submit schedule list` names them"
            )
        timetable.remove(schedules, words[0])
        typer.echo(f"removed {words[0]}")
        return
    if every is None or run is None:
        raise UserError(
            "a schedule needs --every and --run: submit schedule evals --run RUN --every '0 2 * * *'"
        )
    # Now, not in tonight's log.
    _graph(what, words, find_run(run, folder).path.resolve() / "checkpoints" / "step-00000000")
    command = [sys.executable, "-m", "pipeline.cli", "evaluate", run, *(words or [])]
    command += ["--dag", what, "--folder", str(folder), "--executor", executor, "--cluster", cluster]
    command += ["--newest"] if newest else []
    command += [] if steps_apart is None else ["--steps-apart", str(steps_apart)]
    command += [] if gpu_hours is None else ["--gpu-hours", str(gpu_hours)]
    command += ["--trust"] if trust else []
    made = timetable.install(
        schedules, name or f"{what}-{Path(run).name}", every, command, site_for_jobs(cluster)
    )
    typer.echo(
        f"{made.name}: {made.every}, by {made.fired_by}; `submit schedule remove {made.name}` removes it"
    )
