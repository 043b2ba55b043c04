"""A pretraining run as a job for a cluster."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import UserError
from cluster.job import Job, Resources
from pipeline.recipe.pretrain import PretrainRecipe, Run
from pipeline.recipe.stages import Machines


def pretrain_job(recipe: PretrainRecipe, folder: Path, resources: Resources) -> Job:
    """The job that trains this recipe in a run folder; whoever goes on with it may do so from elsewhere."""
    return Job(
        name=recipe.run.name or folder.name,
        function="pipeline.train.loop:run_pretrain",
        arguments={"recipe": recipe.placed().model_dump(mode="json"), "folder": str(folder)},
        resources=resources,
        folder=folder,
    )


def resources_for(run: Run | Machines, *, gpus_per_node: int | None = None) -> Resources:
    """What a recipe's `run` section asks for: by default one rank per GPU, or one on the CPU.

    Args:
        gpus_per_node: of the machines it will run on; None: like this one.

    Raises:
        UserError: if there are fewer GPUs than ranks, or none here although the recipe wants one.
    """
    gpus = 0 if run.device == "cpu" else _gpus_here(run) if gpus_per_node is None else gpus_per_node
    ranks = run.ranks_per_node or max(1, gpus)
    if gpus and ranks > gpus:
        raise UserError(
            f"{ranks} ranks need {ranks} GPUs, there are {gpus}: use --ranks {gpus}, or of a stage "
            f"run.ranks_per_node={gpus}, or run.device=cpu"
        )
    return Resources(nodes=run.nodes, ranks_per_node=ranks, gpus_per_rank=1 if gpus else 0)


def _gpus_here(run: Run | Machines) -> int:
    from cluster.rank.torch_dist import gpus_here

    return gpus_here(run.device)
