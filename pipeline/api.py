"""What Python code and notebooks use: docs/python.md describes it.

Nothing here needs `if __name__ == "__main__"`: workers are started without the script that asks for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cluster.errors import UserError
from cluster.json_rows import read_rows
from cluster.run.folder import RunFolder, list_runs
from cluster.typed_yaml import load_recipe
from ingest.dataset import webdataset
from ingest.dataset.open import Dataset, open_dataset
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.stages import FeaturePrecision
from pipeline.train.loop import pretrain as _pretrain
from pipeline.transfer.evaluations import EVALUATIONS
from pipeline.transfer.extract import extract_features
from pipeline.transfer.feature_table import write_table
from pipeline.trunks.classifier import load_classifier
from pipeline.trunks.export import export_classifier, export_trunk
from pipeline.trunks.files import ExportedTrunk, load_trunk

__all__ = [
    "Dataset",
    "ExportedTrunk",
    "PretrainRecipe",
    "RunFolder",
    "UserError",
    "export_classifier",
    "export_trunk",
    "list_runs",
    "load_classifier",
    "load_trunk",
    "open_dataset",
    "open_run",
    "pretrain",
    "read_metrics",
    "read_recipe",
    "score",
    "webdataset",
    "write_features",
]


def read_recipe(name: str | Path, *changes: str) -> PretrainRecipe:
    """A recipe of a training, checked: one that is shipped, by its name, or a YAML file.

    Args:
        changes: "optim.lr=0.3", as `submit pretrain` takes them.

    Raises:
        UserError: there is none, or a key or a value in it is wrong.
    """
    return load_recipe(PretrainRecipe, str(name), list(changes), kind="pretrain")


def pretrain(recipe: PretrainRecipe, run: str | Path) -> None:
    """Train in this process, to the last step, or go on with what is in the run folder.

    Raises:
        UserError: the recipe does not fit the data, the machine, or what is in the folder.
        SystemExit: it was stopped by Ctrl-C, and has saved: the same call goes on.
    """
    _pretrain(recipe, Path(run))


def open_run(run: str | Path) -> RunFolder:
    """A run that `submit` has started: its `read_status()`, its `log_text(rank)`.

    Raises:
        UserError: there is none.
    """
    return RunFolder.open(Path(run))


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl: step, loss, learning rate and so on.

    Raises:
        UserError: there are none yet, or a row is damaged.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        return list(read_rows(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; is {run} a run that has begun?") from error


def write_features(
    trunk: ExportedTrunk,
    dataset: Dataset,
    output: str | Path,
    *,
    workers: int = 2,
    precision: FeaturePrecision = "fp32",
) -> int:
    """What `submit features` does, on the device that the trunk is on; answers how many rows there are.

    Raises:
        UserError: the file cannot be of that kind or precision, or a sample cannot be read.
    """
    device = _device_of(trunk)
    return write_table(trunk, dataset, Path(output), workers=workers, device=device, precision=precision)


def score(
    evaluation: str, trunk: ExportedTrunk, train: Dataset, test: Dataset, *changes: str, workers: int = 2
) -> dict[str, float]:
    """Score a trunk, on the device that it is on, with features in memory.

    Args:
        evaluation: "knn", "linear", …: the commands of `submit` that score features.
        changes: to its recipe, "k=[5, 10]".

    Raises:
        UserError: there is no such evaluation, or it does not fit the data.
    """
    if evaluation not in EVALUATIONS:
        raise UserError(f"no evaluation is called {evaluation!r}; choose one of {', '.join(EVALUATIONS)}")
    chosen, device = EVALUATIONS[evaluation], _device_of(trunk)
    recipe = load_recipe(chosen.recipe, evaluation, list(changes), kind="transfer")
    chosen.refuse(recipe, len(train))
    learnt, asked = (
        extract_features(
            trunk,
            dataset,
            preprocessing=trunk.preprocessing,
            workers=workers,
            device=device,
            several_labels=chosen.several_labels,
        )
        for dataset in (train, test)
    )
    return chosen.score(learnt, asked, recipe, device=device).metrics()


def _device_of(trunk: ExportedTrunk) -> torch.device:
    return next((tensor.device for tensor in trunk.parameters()), torch.device("cpu"))
