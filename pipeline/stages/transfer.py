"""The stages that score a trunk, or test a classifier."""

from __future__ import annotations

from cluster.rank.torch_dist import choose_device
from pipeline.dag.stage import Result, Work
from pipeline.stages.inputs import opened
from pipeline.stages.machine import gpus_held
from pipeline.transfer.evaluations import Evaluation
from pipeline.transfer.features import extract_from_files, load_features, save_features
from pipeline.transfer.predict import predict, summarise, write_predictions
from pipeline.trunks.classifier import load_classifier


def features(work: Work) -> Result:
    """train.safetensors and test.safetensors."""
    device = choose_device(work.recipe.run.device)
    train, test = extract_from_files(
        work.inputs["trunk"].path,
        opened(work.inputs["train"]),
        opened(work.inputs["test"]),
        workers=work.recipe.run.workers,
        device=device,
        several_labels=True,
    )
    save_features(train, work.folder / "train.safetensors")
    save_features(test, work.folder / "test.safetensors")
    metrics = {"train_samples": len(train.y), "test_samples": len(test.y), "feature_dim": train.x.shape[1]}
    return Result(metrics, ["train.safetensors", "test.safetensors"], gpus_held(device))


def predictions(work: Work) -> Result:
    """predictions.parquet: a row for each labelled image of the input `test`."""
    device = choose_device(work.recipe.run.device)
    found = predict(
        load_classifier(work.inputs["classifier"].path).to(device),
        opened(work.inputs["test"]),
        work.recipe,
        workers=work.recipe.run.workers,
        device=device,
    )
    write_predictions(found, work.folder / "predictions.parquet")
    return Result(summarise(found), ["predictions.parquet"], gpus_held(device))


def score(evaluation: Evaluation, work: Work) -> Result:
    """An evaluation of extracted features."""
    folder, device = work.inputs["features"].path, choose_device("auto")
    train, test = (load_features(folder / f"{name}.safetensors") for name in ("train", "test"))
    scores = evaluation.score(train, test, work.recipe, device=device)
    return Result(scores.metrics(), [], gpus_held(device))
