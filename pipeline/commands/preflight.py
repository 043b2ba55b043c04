"""`submit preflight`: is every node fit?"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.executors import make_executor
from cluster.job import ExecutorName, Resources
from cluster.site import Site, site_for_jobs
from pipeline.commands.options import Cluster, ExecutorOption, Json, Runs
from pipeline.commands.place import site_on


def preflight(  # noqa: PLR0917 -- typer passes by name
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="How many machines to check.")] = 1,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Processes per machine; by default one per GPU.")
    ] = None,
    folder: Runs = Path("runs"),
    executor: ExecutorOption = None,
    cluster: Cluster = "default",
    readmit: Annotated[
        str | None, typer.Option("--readmit", metavar="NODE", help="Use an excluded machine again, and exit.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check which machines are fit for a large run, and exclude the others from later runs."""
    from cluster.preflight import exclusions
    from cluster.preflight.preflight import preflight as look_at
    from cluster.preflight.verdict import fitness_table, to_json

    if readmit is not None:
        exclusions.readmit(folder, readmit)
        typer.echo(f"{readmit} is used again")
        return
    site = site_for_jobs(cluster)
    chosen = executor or site.default_executor()
    site = site_on(chosen, site, ranks=ranks)
    gpus = _gpus_per_node(chosen, site)
    resources = Resources(nodes=nodes, ranks_per_node=ranks or max(1, gpus), gpus_per_rank=1 if gpus else 0)
    verdicts = look_at(
        make_executor(chosen, site, exclude=exclusions.excluded_nodes(folder)),
        resources,
        folder.absolute() / f"preflight-{time.strftime('%Y%m%d-%H%M%S')}",
        thresholds=site.preflight,
    )
    if as_json:
        typer.echo(json.dumps(to_json(verdicts), indent=2))
    else:
        Console().print(fitness_table(verdicts))
    if all(verdict.fit for verdict in verdicts):
        return
    if chosen != "local":
        for node in exclusions.exclude(folder, verdicts):
            typer.echo(
                f"{node} is excluded from now on; `submit preflight --readmit {node}` readmits it", err=True
            )
    raise typer.Exit(1)


def _gpus_per_node(executor: ExecutorName, site: Site) -> int:
    if executor != "local" and site.gpus_per_node is not None:
        return site.gpus_per_node
    from cluster.rank.torch_dist import gpus_here

    return gpus_here()
