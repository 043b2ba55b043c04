"""The stages that score a trunk, or test a classifier."""

from __future__ import annotations

from typing import Any

from cluster.errors import UserError
from cluster.job import Job, Resources
from cluster.rank.torch_dist import choose_device
from cluster.run.folder import RunFolder
from pipeline.dag.stage import Result, Work
from pipeline.stages.inputs import opened, pinned
from pipeline.stages.machine import gpus_held
from pipeline.transfer.cross_modal import cross_modal
from pipeline.transfer.embed import embed_videos
from pipeline.transfer.evaluations import Evaluation
from pipeline.transfer.features import load_features, save_features
from pipeline.transfer.predict import read_predictions, summarise
from pipeline.transfer.statistics import mean_of_seeds
from pipeline.trunks.embedder import load_embedder


def features_job(work: Work, resources: Resources) -> Job:
    """The extraction, of which every rank does its part."""
    arguments = {
        "trunk": str(work.inputs["trunk"].path),
        "train": pinned(work.inputs["train"]),
        "test": pinned(work.inputs["test"]),
    }
    return _job(work, resources, "pipeline.stages.ranks:extract", arguments)


def features(work: Work) -> Result:
    """train.safetensors and test.safetensors."""
    outputs = ["train.safetensors", "test.safetensors"]
    train, test = (load_features(work.folder / name) for name in outputs)
    metrics = {"train_samples": len(train.y), "test_samples": len(test.y), "feature_dim": train.x.shape[1]}
    return Result(metrics, outputs, job=RunFolder(work.folder).read_status().until_now())


def predict_job(work: Work, resources: Resources) -> Job:
    """The predictions, of which every rank makes its part."""
    arguments = {"classifier": str(work.inputs["classifier"].path), "test": pinned(work.inputs["test"])}
    return _job(work, resources, "pipeline.stages.ranks:predict", arguments)


def predictions(work: Work) -> Result:
    """predictions.parquet: a row for each labelled image of the input `test`."""
    found = summarise(read_predictions(work.folder / "predictions.parquet"))
    return Result(found, ["predictions.parquet"], job=RunFolder(work.folder).read_status().until_now())


def score(evaluation: Evaluation, work: Work) -> Result:
    """An evaluation of extracted features."""
    folder, device = work.inputs["features"].path, choose_device("auto")
    train, test = (load_features(folder / f"{name}.safetensors") for name in ("train", "test"))
    scores = evaluation.score(train, test, work.recipe, device=device)
    return Result(scores.metrics(), [], gpus_held(device))


def embeddings(work: Work) -> Result:
    """video.safetensors and audio.safetensors, of the same videos in the same order."""
    device = choose_device(work.recipe.run.device)
    both = embed_videos(
        load_embedder(work.inputs["run"].path),
        opened(work.inputs["data"]),
        windows=work.recipe.windows,
        workers=work.recipe.run.workers,
        device=device,
    )
    outputs = ["video.safetensors", "audio.safetensors"]
    for features, name in zip(both, outputs, strict=True):
        save_features(features, work.folder / name)
    return Result({"samples": len(both[0].y), "dim": both[0].x.shape[1]}, outputs, gpus_held(device))


def retrieval(work: Work) -> Result:
    """Of a clip the right sound among all, and of a sound the right clip."""
    folder = work.inputs["embeddings"].path
    video, audio = (load_features(folder / f"{name}.safetensors").x for name in ("video", "audio"))
    return Result(cross_modal(video, audio, at=work.recipe.at).metrics(), [])


def mean(work: Work) -> Result:
    """The mean over the inputs, and its interval by Student's t."""
    metric = work.recipe.metric
    missing = [name for name, each in work.inputs.items() if metric not in each.receipt.metrics]
    if missing:
        raise UserError(f"{', '.join(missing)} found out no {metric}: name another as recipe.metric")
    values = [work.inputs[name].receipt.metrics[metric] for name in sorted(work.inputs)]
    found, interval = mean_of_seeds(values)
    return Result(
        {metric: found, f"{metric}_low": interval.low, f"{metric}_high": interval.high, "of": len(values)}, []
    )


def _job(work: Work, resources: Resources, function: str, arguments: dict[str, Any]) -> Job:
    return Job(
        name=work.folder.name,
        function=function,
        arguments={
            "recipe": work.recipe.model_dump(mode="json"),
            "folder": str(work.folder),
            **arguments,
        },
        resources=resources,
        folder=work.folder,
    )
