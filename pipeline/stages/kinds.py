"""The kinds of stages: each a plain function from recipe and inputs to files and numbers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pipeline.dag.digests import folder_identity
from pipeline.dag.stage import Kind, Later
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.stages import (
    CheckpointRecipe,
    Cifar10TableRecipe,
    ClipsRecipe,
    ClipsReportRecipe,
    CompareRecipe,
    CrossModalRecipe,
    DatasetRecipe,
    DedupRecipe,
    EmbeddingsRecipe,
    ExportRecipe,
    FeaturesRecipe,
    FiguresRecipe,
    HashtagsRecipe,
    MeanRecipe,
    PhotographsRecipe,
    PixelsRecipe,
    RandomTrunkRecipe,
    ReportRecipe,
    ShardsRecipe,
    SubsetRecipe,
    TrunkRecipe,
)
from pipeline.recipe.transfer import PredictRecipe
from pipeline.report.clip_scores import CLIP_SCORES
from pipeline.report.published import TABLE_ROLES
from pipeline.report.scores import SCORES, SEVERAL_LABELS
from pipeline.stages.machine import one_gpu, one_gpu_or_none
from pipeline.train.job import resources_for
from pipeline.transfer.evaluations import EVALUATIONS

KINDS: dict[str, Kind] = {
    "photographs": Kind(
        recipe=PhotographsRecipe,
        run=Later("pipeline.stages.data:photographs"),
        outside=Later("pipeline.stages.photographs:identity"),
        version=2,
    ),
    "clips": Kind(
        recipe=ClipsRecipe,
        run=Later("pipeline.stages.data:clips"),
        outside=Later("pipeline.stages.clips:identity"),
    ),
    "shards": Kind(
        recipe=ShardsRecipe,
        run=Later("pipeline.stages.data:shards"),
        optional=frozenset({"source"}),
        outside=lambda recipe: folder_identity(Path(recipe.source)) if recipe.source else "",
    ),
    "dataset": Kind(
        recipe=DatasetRecipe,
        run=Later("pipeline.stages.data:dataset"),
        outside=Later("pipeline.stages.data:dataset_identity"),
    ),
    "subset": Kind(
        recipe=SubsetRecipe,
        run=Later("pipeline.stages.data:subset"),
        inputs=frozenset({"data"}),
        outside=Later("pipeline.stages.data:subset_identity"),
    ),
    "dedup": Kind(
        recipe=DedupRecipe,
        run=Later("pipeline.stages.data:dedup"),
        inputs=frozenset({"data"}),
        optional=frozenset({"against"}),
    ),
    "checkpoint": Kind(
        recipe=CheckpointRecipe,
        run=Later("pipeline.stages.data:checkpoint"),
        outside=Later("pipeline.stages.data:checkpoint_identity"),
    ),
    "hashtags": Kind(
        recipe=HashtagsRecipe,
        run=Later("pipeline.stages.data:hashtags"),
        inputs=frozenset({"data"}),
        optional=frozenset({"classes"}),
    ),
    "pretrain": Kind(
        recipe=PretrainRecipe,
        run=Later("pipeline.stages.training:trained"),
        job=Later("pipeline.stages.training:train_job"),
        resources=lambda recipe, gpus: resources_for(recipe.run, gpus_per_node=gpus),
        refuse=Later("pipeline.train.fit:refuse_unfit_ranks"),
        inputs=frozenset({"data"}),
        optional=frozenset({"probe_train", "probe_test", "tags", "start"}),
        watching=frozenset({"probe_train", "probe_test"}),
    ),
    "finetune": Kind(
        recipe=PretrainRecipe,
        run=Later("pipeline.stages.training:finetuned"),
        job=Later("pipeline.stages.training:finetune_job"),
        resources=lambda recipe, gpus: resources_for(recipe.run, gpus_per_node=gpus),
        refuse=Later("pipeline.stages.training:refuse_finetuning"),
        inputs=frozenset({"trunk", "data"}),
        optional=frozenset({"test"}),
    ),
    "predict": Kind(
        recipe=PredictRecipe,
        run=Later("pipeline.stages.transfer:predictions"),
        job=Later("pipeline.stages.transfer:predict_job"),
        resources=lambda recipe, gpus: resources_for(recipe.run, gpus_per_node=gpus),
        inputs=frozenset({"classifier", "test"}),
    ),
    "trunk": Kind(
        recipe=TrunkRecipe,
        run=Later("pipeline.stages.trunks:existing"),
        outside=Later("pipeline.stages.trunks:existing_identity"),
    ),
    "export": Kind(
        recipe=ExportRecipe, run=Later("pipeline.stages.trunks:export"), inputs=frozenset({"run"})
    ),
    "random_trunk": Kind(
        recipe=RandomTrunkRecipe,
        run=Later("pipeline.stages.trunks:random"),
        resources=one_gpu_or_none,
        inputs=frozenset({"like", "data"}),
    ),
    "pixels": Kind(
        recipe=PixelsRecipe, run=Later("pipeline.stages.trunks:pixels"), inputs=frozenset({"like"})
    ),
    "features": Kind(
        recipe=FeaturesRecipe,
        run=Later("pipeline.stages.transfer:features"),
        job=Later("pipeline.stages.transfer:features_job"),
        resources=lambda recipe, gpus: resources_for(recipe.run, gpus_per_node=gpus),
        inputs=frozenset({"trunk", "train", "test"}),
    ),
    **{
        name: Kind(
            recipe=evaluation.recipe,
            run=partial(Later("pipeline.stages.transfer:score"), evaluation),
            resources=one_gpu,
            inputs=frozenset({"features"}),
        )
        for name, evaluation in EVALUATIONS.items()
    },
    "embeddings": Kind(
        recipe=EmbeddingsRecipe,
        run=Later("pipeline.stages.transfer:embeddings"),
        resources=one_gpu_or_none,
        inputs=frozenset({"run", "data"}),
    ),
    "cross_modal": Kind(
        recipe=CrossModalRecipe,
        run=Later("pipeline.stages.transfer:retrieval"),
        inputs=frozenset({"embeddings"}),
    ),
    "mean": Kind(recipe=MeanRecipe, run=Later("pipeline.stages.transfer:mean"), alike=2),
    "clips_report": Kind(
        recipe=ClipsReportRecipe,
        run=Later("pipeline.stages.pages:clips_report"),
        inputs=frozenset({"data", "test", "run", "embeddings"}),
        optional=frozenset({"cma", "cross_modal", *CLIP_SCORES}),
    ),
    "report": Kind(
        recipe=ReportRecipe,
        run=Later("pipeline.stages.pages:report"),
        resources=one_gpu,
        inputs=frozenset({"data", "train", "test", "run", "trunk", "features", "features_random"}),
        optional=frozenset({"photographs", *SCORES, *SEVERAL_LABELS}),
        version=3,
    ),
    "compare": Kind(recipe=CompareRecipe, run=Later("pipeline.stages.pages:compare"), alike=2),
    "figures": Kind(recipe=FiguresRecipe, run=Later("pipeline.stages.pages:figures"), alike=1),
    "cifar10_table": Kind(
        recipe=Cifar10TableRecipe,
        run=Later("pipeline.stages.pages:cifar10_table"),
        inputs=TABLE_ROLES,
    ),
}
