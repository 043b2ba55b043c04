"""The stage that pretrains."""

from __future__ import annotations

from typing import Any

from cluster.errors import UserError
from cluster.job import Job, Resources
from cluster.json_rows import last_row
from cluster.run.folder import RunFolder
from pipeline.checkpoint.files import manifest_sums
from pipeline.dag.stage import Result, Work
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.job import pretrain_job


def train_job(work: Work, resources: Resources) -> Job:
    """The training in the stage's folder; it goes on with what an interrupted one has saved."""
    recipe: PretrainRecipe = work.recipe
    data = {"root": str(work.inputs["data"].path), "sealed": work.inputs["data"].receipt.metrics["root"]}
    changes: dict[str, Any] = {"data": recipe.data.model_copy(update=data)}
    if recipe.probe is not None:
        if not {"probe_train", "probe_test"} <= work.inputs.keys():
            raise UserError("the recipe has a probe: give the stage the inputs probe_train and probe_test")
        paths = {name: str(work.inputs[f"probe_{name}"].path) for name in ("train", "test")}
        changes["probe"] = recipe.probe.model_copy(update=paths)
    return pretrain_job(recipe.model_copy(update=changes), work.folder, resources)


def trained(work: Work) -> Result:
    """A run folder, complete: every file of its checkpoints is there, with its size.

    Raises:
        UserError: if one is not.
    """
    last = last_row(work.folder / "metrics.jsonl") or {}
    metrics = {name: value for name, value in last.items() if isinstance(value, int | float)}
    outputs = ["checkpoints", "recipe.yaml", "metrics.jsonl", "timing.jsonl"]
    # Hashed when they were written: terabytes are not read again for the receipt.
    known = manifest_sums(work.folder)
    return Result(metrics, outputs, job=RunFolder(work.folder).read_status().until_now(), known=known)
