"""Where a command's work runs: what a site file leaves out, asked of SLURM, and said."""

from __future__ import annotations

import shutil

import typer

from cluster.job import ExecutorName
from cluster.site import Site


def site_on(
    executor: ExecutorName, site: Site, *, ranks: int | None = None, whole_nodes: bool = True
) -> Site:
    """The site with what its nodes have, said in a line if it was SLURM that told.

    Args:
        ranks: on a node; None: one for each GPU.
        whole_nodes: jobs have all ranks that a node takes; others are not to ask for all of its memory.

    Raises:
        UserError: if SLURM is here, and does not answer.
    """
    if executor != "slurm" or shutil.which("sinfo") is None:
        return site
    said = (site.gpus_per_node, site.cpus_per_rank, site.memory_gb if whole_nodes else 0)
    if site.gpus_per_node == 0 or None not in said:
        return site
    from cluster.slurm.nodes import with_nodes_of_slurm

    found, words = with_nodes_of_slurm(site, ranks=ranks, memory=whole_nodes)
    typer.echo(words, err=True)
    return found
