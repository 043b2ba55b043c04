"""The stages that train."""

from __future__ import annotations

import json
from typing import Any

from cluster.errors import UserError
from cluster.job import Job, Resources
from cluster.json_rows import last_row
from cluster.run.folder import RunFolder
from pipeline.checkpoint.files import manifest_sums
from pipeline.dag.stage import Result, Work
from pipeline.recipe.data import Data
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.transfer import Test
from pipeline.stages.inputs import pinned
from pipeline.train.fit import refuse_uneven
from pipeline.train.job import pretrain_job
from pipeline.train.run_recipe import pin_dataset
from pipeline.trunks.files import start_of


def train_job(work: Work, resources: Resources) -> Job:
    """The training in the stage's folder; it goes on with what an interrupted one has saved."""
    recipe: PretrainRecipe = work.recipe
    data = _data(work)
    if "tags" in work.inputs:
        data = data.model_copy(update={"tags": str(work.inputs["tags"].path)})
    changes: dict[str, Any] = {"data": data}
    if "start" in work.inputs:
        path = str(work.inputs["start"].path)
        changes["train"] = recipe.train.model_copy(update={"init_from": path})
    if recipe.probe is not None:
        if not {"probe_train", "probe_test"} <= work.inputs.keys():
            raise UserError("the recipe has a probe: give the stage the inputs probe_train and probe_test")
        sources = {name: work.inputs[f"probe_{name}"] for name in ("train", "test")}
        if any("view" in source.receipt.metrics for source in sources.values()):
            raise UserError("a probe while training takes whole datasets: give it none of a subset stage")
        paths = {name: str(source.path) for name, source in sources.items()}
        changes["probe"] = recipe.probe.model_copy(update=paths)
    return pretrain_job(pin_dataset(recipe.model_copy(update=changes), work.folder), work.folder, resources)


def finetune_job(work: Work, resources: Resources) -> Job:
    """The same, on labelled images, from an exported trunk: architecture and colours are that one's."""
    recipe: PretrainRecipe = work.recipe
    start = start_of(work.inputs["trunk"].path)
    changes: dict[str, Any] = {
        "data": _data(work).model_copy(update=dict(start.colours)),
        "trunk": start.trunk,
    }
    if "test" in work.inputs:
        changes["test"] = (recipe.test or Test(root="")).model_copy(update=pinned(work.inputs["test"]))
    return pretrain_job(pin_dataset(recipe.model_copy(update=changes), work.folder), work.folder, resources)


def refuse_finetuning(recipe: PretrainRecipe, resources: Resources) -> None:
    """Refuse ranks that could not share the batch. Its trunk is not known before its input is there.

    Raises:
        UserError: saying what does not fit, and what would.
    """
    refuse_uneven(recipe, ranks=resources.ranks, nodes=resources.nodes)


def _data(work: Work) -> Data:
    """The recipe's images, of the input `data`.

    Raises:
        UserError: both the recipe and the input name a view.
    """
    recipe: Data = work.recipe.data
    source = pinned(work.inputs["data"])
    if recipe.view is not None and "view" in source:
        raise UserError(
            f"recipe.data.view is {recipe.view} and the input `data` is a subset already: leave one out"
        )
    return recipe.model_copy(update=source)


def finetuned(work: Work) -> Result:
    """A run folder, complete, with the classifier; the metrics are those of the test set, if there is one."""
    result = trained(work)
    outputs = [*result.outputs, "classifier"]
    test = work.folder / "test.json"
    if test.is_file():
        outputs += ["predictions.parquet", "test.json"]
        result = result._replace(metrics=result.metrics | json.loads(test.read_text()))
    return result._replace(outputs=outputs)


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
