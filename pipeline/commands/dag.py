"""`submit dag`: run the stages of a graph, here or on a cluster, or look how far they are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.job import ExecutorName
from cluster.local import LocalExecutor
from cluster.site import Site, load_site
from pipeline.commands.options import Cluster, Overrides, StagesExecutor, Wait
from pipeline.commands.progress_line import ProgressLine

if TYPE_CHECKING:  # `submit --help` needs no graphs
    from pipeline.dag.recipe import DagRecipe
    from pipeline.dag.stage import Stage


def dag(  # noqa: PLR0917 -- typer passes by name
    name: Annotated[str, typer.Argument(help="A .yaml file, or the name of a shipped graph.")],
    overrides: Overrides = None,
    executor: StagesExecutor = "local",
    cluster: Cluster = "default",
    plan: Annotated[bool, typer.Option("--plan", help="Show how far the stages are, and stop.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", dir_okay=False, help="An SVG file to draw --plan into.")
    ] = None,
    wait: Wait = False,
) -> None:
    """Run the stages of a graph that have not run yet. SLURM gets them all at once, and goes on by itself."""
    from pipeline.dag.graph import build_graph
    from pipeline.dag.recipe import load_dag
    from pipeline.stages.kinds import KINDS

    recipe = load_dag(name, overrides or [])
    stages = build_graph(recipe, KINDS)
    if plan:
        _show_progress(stages, picture)
    elif not run_on(executor, recipe, stages, load_site(cluster), wait=wait):
        typer.echo(f"`submit dag {name} --plan`, with the same overrides, shows how far they are")


def run_on(
    executor: ExecutorName, dag: DagRecipe, stages: Sequence[Stage], site: Site, *, wait: bool = False
) -> bool:
    """Run a graph, and say what came out.

    Returns:
        Whether it has ended; on SLURM it goes on by itself, unless somebody waits.

    Raises:
        UserError: if a stage failed.
    """
    from pipeline.dag.graph import conclude, run_graph

    with contextlib.closing(ProgressLine(sys.stdout)) as progress:

        def say(text: str) -> None:
            progress.write(f"{text}\n")
            progress.flush()

        if executor == "local":
            results = run_graph(stages, LocalExecutor(stream=progress), say=say)
        elif executor == "ray":
            from cluster.ray.executor import RayExecutor
            from pipeline.stages.jobs import run_graph_as_jobs

            on_ray = RayExecutor(site.ray_address, site=site)
            results = run_graph_as_jobs(dag, stages, on_ray, gpus_per_node=site.gpus_per_node, say=say)
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


def _show_progress(stages: Sequence[Stage], picture: Path | None) -> None:
    from pipeline.dag.drawing import draw_progress
    from pipeline.dag.progress import look_at_stages, progress_text

    rows = look_at_stages(stages)
    typer.echo(progress_text(rows))
    if picture is not None:
        draw_progress(rows, picture)
        typer.echo(f"as a picture: {picture}")
