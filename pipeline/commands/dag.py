"""`submit dag`: run the stages of a graph, here or on a cluster, or look how far they are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import UserError
from cluster.job import ExecutorName
from cluster.local import LocalExecutor
from cluster.site import Site, site_for_jobs
from pipeline.commands.options import Cluster, Overrides, StagesExecutor, Wait
from pipeline.commands.place import site_on
from pipeline.commands.progress_line import ProgressLine, StageLines

if TYPE_CHECKING:  # `submit --help` needs no graphs
    from pipeline.dag.graph import Failed
    from pipeline.dag.recipe import DagRecipe
    from pipeline.dag.stage import Receipt, Stage


def dag(  # noqa: PLR0917 -- typer passes by name
    name: Annotated[str, typer.Argument(help="A .yaml file, or the name of a shipped graph.")],
    overrides: Overrides = None,
    executor: StagesExecutor = "local",
    cluster: Cluster = "default",
    plan: Annotated[bool, typer.Option("--plan", help="Show the state of each stage, and exit.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", dir_okay=False, help="Draw --plan as this SVG file.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            min=1,
            help="How many stages to run at a time on this machine; by default one per GPU, or per 8 cores.",
        ),
    ] = None,
    wait: Wait = False,
) -> None:
    """Run the stages of a graph that have not run yet, as many at a time as there is room for. On SLURM, all
    of them are submitted at once, and need nobody to wait for them.
    """
    from pipeline.dag.graph import build_graph
    from pipeline.dag.recipe import load_dag
    from pipeline.stages.kinds import KINDS

    if jobs is not None and executor != "local":
        raise UserError(
            f"--jobs is about this machine, and {executor} queues what it has no room for: leave it out"
        )
    if picture is not None and not plan:
        raise UserError("--picture draws what --plan shows: give --plan, too")
    recipe = load_dag(name, overrides or [])
    stages = build_graph(recipe, KINDS)
    if plan:
        _show_progress(stages, picture)
    elif not run_on(executor, recipe, stages, site_for_jobs(cluster), jobs=jobs, wait=wait):
        typer.echo(f"`submit dag {name} --plan`, with the same changes, shows the state of each stage")


def run_on(
    executor: ExecutorName,
    dag: DagRecipe,
    stages: Sequence[Stage],
    site: Site,
    *,
    jobs: int | None = None,
    wait: bool = False,
) -> bool:
    """Run a graph, and say what came out.

    Args:
        jobs: stages at a time on this machine; None: as there is room for.

    Returns:
        Whether it has ended; on SLURM it goes on by itself, unless somebody waits.

    Raises:
        UserError: if a stage failed.
    """
    from pipeline.dag.graph import conclude
    from pipeline.dag.planned import write_planned
    from pipeline.stages.fit import refuse_uneven_stages

    if executor == "slurm":
        site = site_on("slurm", site, whole_nodes=False)
    refuse_uneven_stages(stages, gpus_per_node=None if executor == "local" else site.gpus_per_node)
    write_planned(stages)
    with contextlib.closing(ProgressLine(sys.stdout)) as progress:

        def say(text: str) -> None:
            progress.write(f"{text}\n")
            progress.flush()

        if executor == "local":
            results = _run_here(dag, stages, progress, jobs=jobs, say=say)
        elif executor == "ray":
            from cluster.ray.executor import RayExecutor
            from pipeline.stages.room import Queue
            from pipeline.stages.side_by_side import run_side_by_side

            on_ray = Queue(executor=RayExecutor(site.ray_address, site=site))
            results = run_side_by_side(dag, stages, on_ray, gpus_per_node=site.gpus_per_node, say=say)
        else:
            from cluster.preflight.exclusions import excluded_nodes
            from cluster.slurm.executor import SlurmExecutor
            from pipeline.stages.jobs import submit_graph, wait_for_graph

            on_slurm = SlurmExecutor(site, exclude=tuple(excluded_nodes(Path(dag.folder).parent)))
            handles = submit_graph(dag, stages, on_slurm, gpus_per_node=site.gpus_per_node, say=say)
            if handles and not wait:
                return False
            results = wait_for_graph(stages, handles)
        conclude(dag, stages, results, say=say)
    return True


def _run_here(
    dag: DagRecipe,
    stages: Sequence[Stage],
    progress: ProgressLine,
    *,
    jobs: int | None,
    say: Callable[[str], None],
) -> dict[str, Receipt | Failed]:
    """One after the other in this process, or side by side in processes of their own."""
    from pipeline.dag.ensure import is_finished
    from pipeline.dag.graph import run_graph
    from pipeline.stages.room import machine_here
    from pipeline.stages.side_by_side import run_side_by_side

    if jobs != 1 and not all(map(is_finished, stages)):
        machine = machine_here(jobs, stream=lambda stage: StageLines(stage, progress))
        if machine.jobs > 1:
            return run_side_by_side(dag, stages, machine, say=say)
    return run_graph(stages, LocalExecutor(stream=progress), say=say)


def _show_progress(stages: Sequence[Stage], picture: Path | None) -> None:
    from pipeline.dag.drawing import draw_progress
    from pipeline.dag.progress import look_at_stages, progress_text

    rows = look_at_stages(stages)
    typer.echo(progress_text(rows))
    if picture is not None:
        draw_progress(rows, picture)
        typer.echo(f"as a picture: {picture}")
