"""What a run folder was made of: the resolved recipe, the code, the machine."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.run.source import source_version
from cluster.typed_yaml import read_yaml
from ingest.dataset.open import open_dataset
from pipeline.data.training_set import TrainingSet, open_training_set
from pipeline.recipe.method import Classification
from pipeline.recipe.pretrain import LAYOUT, PretrainRecipe
from pipeline.transfer.predict import check_test_set


def pin_dataset(recipe: PretrainRecipe, folder: Path) -> PretrainRecipe:
    """The recipe with the dataset root that this run reads for life, whatever is sealed later; if it learns
    from labels, with how many there are, and the root of its test set.

    A recipe that names no root gets the one that the run began with; a new run gets the latest.

    Raises:
        UserError: if a new run's dataset cannot be opened, or has other labels than the recipe says; or the
            test set cannot be opened, or has labels that are no class.
    """
    if recipe.data.sealed is None:
        saved = folder / "recipe.yaml"
        there = read_yaml(saved)["data"]["sealed"] if saved.is_file() else open_dataset(recipe.data.root).root
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
    """Write recipe.yaml into a new run folder, or make sure that the one there means the same training.

    Raises:
        UserError: naming every key that differs. The `run` section may differ, it changes no number; and how
            the training lies on its ranks, which changes none beyond rounding.
    """
    check_same_recipe(recipe, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "recipe.yaml", to_yaml(recipe))


def check_same_recipe(recipe: PretrainRecipe, folder: Path) -> None:
    """Refuse to go on in a folder that holds another recipe; a folder without one is new."""
    if not (folder / "recipe.yaml").is_file():
        return
    there, here = _with_defaults(read_yaml(folder / "recipe.yaml")), recipe.model_dump(mode="json")
    different = differing_keys(_numbers(there), _numbers(here))
    if different:
        raise UserError(
            f"{folder} holds a run with another recipe ({'; '.join(different)}): "
            "give the same recipe to go on with it, or another --run"
        )


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved recipe with the keys that have come since, at their defaults, which train as it was trained."""
    try:
        return PretrainRecipe.model_validate(saved).model_dump(mode="json")
    except ValidationError:
        return saved  # of keys that are gone: what differs is named


def _numbers(recipe: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe decides on the numbers."""
    train = {key: value for key, value in recipe["train"].items() if key not in LAYOUT}
    return recipe | {"run": None, "test": None, "train": train}


def differing_keys(there: Any, here: Any, key: str = "") -> list[str]:
    """What differs between two trees of plain values, as "optim.lr is 0.3 there, 0.6 here"."""
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(name, there.get(name), here.get(name)) for name in sorted(there.keys() | here.keys())]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(there, here, strict=True))]
    else:
        return [] if there == here else [f"{key} is {there!r} there, {here!r} here"]
    found = []
    for name, one, other in pairs:
        found += differing_keys(one, other, f"{key}.{name}" if key else name)
    return found


def to_yaml(recipe: PretrainRecipe) -> str:
    """The resolved recipe, every default written out, as a file that can be run again."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=110)


def record_attempt(folder: Path, *, ranks: int, device: str) -> None:
    """Add a line to attempts.jsonl: which code ran, where, on what."""
    values = {
        "time": time.time(),
        "host": socket.gethostname(),
        "ranks": ranks,
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **source_version(),
    }
    with (folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def record_warm_start(folder: Path, weights: Path) -> None:
    """Write init_from.json: which file the trunk's weights started from, and its digest."""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    values = {"path": str(weights.absolute()), "sha256": digest}
    write_atomically(folder / "init_from.json", json.dumps(values, indent=2) + "\n")
