"""The kinds of stages: plain functions from recipe and inputs to files and numbers, and the table of them."""

from __future__ import annotations

from pathlib import Path

from ingest.dataset.open import open_dataset
from pipeline.dag.digests import folder_identity
from pipeline.dag.stage import Kind
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.transfer import KnnRecipe, LinearRecipe
from pipeline.report.cifar10 import ROLES as CIFAR10_ROLES
from pipeline.report.cifar10 import Cifar10TableRecipe
from pipeline.report.compare import CompareRecipe
from pipeline.report.run_report import ReportRecipe
from pipeline.stages.data import (
    CheckpointRecipe,
    DatasetRecipe,
    ShardsRecipe,
    _manifest,
    checkpoint,
    dataset,
    photographs,
    shards,
)
from pipeline.stages.machine import _one_gpu, _one_gpu_or_none
from pipeline.stages.pages import REPORT_INPUTS, REPORT_OPTIONAL, cifar10_table, compare, report
from pipeline.stages.photographs import PhotographsRecipe, identity
from pipeline.stages.training import train_job, trained
from pipeline.stages.transfer import FeaturesRecipe, features, score_knn, score_linear
from pipeline.stages.trunks import ExportRecipe, PixelsRecipe, RandomTrunkRecipe, export, pixels, random
from pipeline.train.job import resources_for

KINDS: dict[str, Kind] = {
    "photographs": Kind(recipe=PhotographsRecipe, run=photographs, outside=identity),
    "shards": Kind(
        recipe=ShardsRecipe,
        run=shards,
        optional=frozenset({"source"}),
        outside=lambda recipe: folder_identity(Path(recipe.source)) if recipe.source else "",
    ),
    "dataset": Kind(
        recipe=DatasetRecipe,
        run=dataset,
        outside=lambda recipe: open_dataset(recipe.path, sealed=recipe.sealed).root,
    ),
    "checkpoint": Kind(recipe=CheckpointRecipe, run=checkpoint, outside=_manifest),
    "pretrain": Kind(
        recipe=PretrainRecipe,
        run=trained,
        job=train_job,
        resources=lambda recipe, gpus: resources_for(recipe.run, gpus_per_node=gpus),
        inputs=frozenset({"data"}),
        optional=frozenset({"probe_train", "probe_test"}),
    ),
    "export": Kind(recipe=ExportRecipe, run=export, inputs=frozenset({"run"})),
    "random_trunk": Kind(
        recipe=RandomTrunkRecipe, run=random, resources=_one_gpu_or_none, inputs=frozenset({"like", "data"})
    ),
    "pixels": Kind(recipe=PixelsRecipe, run=pixels, inputs=frozenset({"like"})),
    "features": Kind(
        recipe=FeaturesRecipe,
        run=features,
        resources=_one_gpu_or_none,
        inputs=frozenset({"trunk", "train", "test"}),
    ),
    "knn": Kind(recipe=KnnRecipe, run=score_knn, resources=_one_gpu, inputs=frozenset({"features"})),
    "linear": Kind(recipe=LinearRecipe, run=score_linear, resources=_one_gpu, inputs=frozenset({"features"})),
    "report": Kind(
        recipe=ReportRecipe,
        run=report,
        resources=_one_gpu,
        inputs=REPORT_INPUTS,
        optional=REPORT_OPTIONAL,
        version=3,
    ),
    "compare": Kind(recipe=CompareRecipe, run=compare, alike=2),
    "cifar10_table": Kind(recipe=Cifar10TableRecipe, run=cifar10_table, inputs=CIFAR10_ROLES),
}
