"""What a run folder was made of: the resolved recipe, the code, the machine."""

from __future__ import annotations

import json
import platform
import socket
import time
from pathlib import Path

import torch
import yaml

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.run.source import source_version
from cluster.typed_yaml import absolute, read_yaml
from ingest.dataset.open import has_root, open_dataset
from ingest.video.container import library_versions
from pipeline.data.training_set import TrainingSet, open_training_set
from pipeline.recipe.method import Classification
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.steering import check_may_go_on, record_change
from pipeline.transfer.predict import check_test_set
from pipeline.trunks.weight_files import digest_of


def pin_dataset(recipe: PretrainRecipe, folder: Path) -> PretrainRecipe:
    """The recipe with the dataset root that this run reads for life, whatever is sealed later; if it learns
    from labels, with how many there are, and the root of its test set.

    A recipe that names no root gets the one that the run began with, unless it names another place, which
    does not have it; a new run gets the latest.

    Raises:
        UserError: if a new run's dataset cannot be opened, or has other labels than the recipe says; or the
            test set cannot be opened, or has labels that are no class.
    """
    if recipe.data.sealed is None:
        saved = folder / "recipe.yaml"
        before = read_yaml(saved)["data"] if saved.is_file() else None
        if before is not None and (
            absolute(before["root"]) == absolute(recipe.data.root)
            or has_root(recipe.data.root, before["sealed"])
        ):
            there = before["sealed"]
        else:
            there = open_dataset(recipe.data.root).root
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sealed": there})})
    if not recipe.method.supervised:
        return recipe
    training_set, test = open_training_set(recipe.data), recipe.test
    if test is not None:  # to be told now, and not after days of training
        test_set = open_dataset(test.root, sealed=test.sealed, view=test.view)
        check_test_set(test_set, training_set.classes, test.predict)
        recipe = recipe.model_copy(update={"test": test.model_copy(update={"sealed": test_set.root})})
    return count_classes(recipe, training_set)


def count_classes(recipe: PretrainRecipe, training_set: TrainingSet) -> PretrainRecipe:
    """The recipe with the number of labels or tags of its data, if its method learns from them.

    Raises:
        UserError: if that is less than two, or the recipe says another.
    """
    method = recipe.method
    if not isinstance(method, Classification):
        return recipe
    found, said = len(training_set.classes), method.classes
    where = training_set.dataset.path if training_set.tags is None else training_set.tags.folder
    if found < 2:
        raise UserError(
            f"{where} has {found} labels, and method {method.name} needs two at least: "
            "`ingest crawl-shards --help` says how labels are seen from paths, or read from files"
        )
    if said is not None and said != found:
        raise UserError(f"method.classes is {said}, and {where} has {found} labels: leave it out")
    return recipe.model_copy(update={"method": method.model_copy(update={"classes": found})})


def adopt(recipe: PretrainRecipe, folder: Path) -> None:
    """Write recipe.yaml into a new run folder; or go on in one, and record what is other than before.

    Raises:
        UserError: naming every key that differs and may not: see `pipeline.train.steering`.
    """
    if changed := check_may_go_on(recipe, folder):
        record_change(folder, changed)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "recipe.yaml", to_yaml(recipe))


def to_yaml(recipe: PretrainRecipe) -> str:
    """The resolved recipe, every default written out, as a file that can be run again."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=110)


def record_attempt(folder: Path, *, ranks: int, device: str, of_clips: bool = False) -> None:
    """Add a line to attempts.jsonl: which code ran, where, on what; and if videos are read, what decodes
    them, for releases of FFmpeg give other samples of the same sound.
    """
    values = {
        "time": time.time(),
        "host": socket.gethostname(),
        "ranks": ranks,
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **source_version(),
    }
    if of_clips:
        values["decoder"] = library_versions()
    with (folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def record_warm_start(folder: Path, weights: Path) -> None:
    """Write init_from.json: which file the trunk's weights started from, and its digest."""
    values = {"path": str(weights.absolute()), "sha256": digest_of(weights)}
    write_atomically(folder / "init_from.json", json.dumps(values, indent=2) + "\n")
