"""What may be other when a run goes on, and what was: the changes of a run, by whom and from which step.

RUN/changes.jsonl   a row for each time that the run went on otherwise than before

A change of anything else begins another run: from the start, or as a branch from a checkpoint.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cluster.errors import UserError
from cluster.host import user_name
from cluster.json_rows import read_rows
from cluster.typed_yaml import read_yaml
from pipeline.checkpoint.files import latest, step_of
from pipeline.recipe.method import BYOL, Classification
from pipeline.recipe.pretrain import PretrainRecipe

# Where a run is may be spelt in several ways, and says nothing about it.
_PLACES = ("run.name", "run.folder")
_LENGTH = ("train.steps", "train.epochs")
# What there is to carry from a checkpoint.
_SHAPED_BY = ("method.", "trunk.", "audio_trunk", "optim.name")
BANK_IS_OF = ("data.sealed", "data.view")

Differences = dict[str, tuple[Any, Any]]  # dotted key → its value there, and here


@dataclass(frozen=True, kw_only=True)
class Change:
    """A run went on with other settings.

    Attributes:
        time: seconds since 1970.
        step: of the checkpoint that it went on from; 0 if it had none.
        settings: dotted key → its value before, and since.
    """

    time: float
    user: str
    step: int
    settings: Mapping[str, tuple[Any, Any]]

    def __str__(self) -> str:
        return f"from step {self.step} on, by {self.user}: {in_words(self.settings)}"


_ROW = TypeAdapter(Change)


def in_words(settings: Mapping[str, tuple[Any, Any]]) -> str:
    """Changes for people: "optim.lr 0.3 → 0.1"."""
    return ", ".join(f"{key} {_text(old)} → {_text(new)}" for key, (old, new) in settings.items())


def check_may_go_on(recipe: PretrainRecipe, folder: Path) -> Differences:
    """What a run that goes on with this recipe changes; nothing in a folder that holds no run yet.

    Raises:
        UserError: naming every key that may not change, and what to do instead.
    """
    if not (folder / "recipe.yaml").is_file():
        return {}
    saved, checkpoint = read_yaml(folder / "recipe.yaml"), latest(folder)
    other = differences(_identity(saved), _identity(recipe.model_dump(mode="json")))
    if other.keys() <= set(_LENGTH) and not paced_by_its_length(recipe):
        _refuse_to_end_before(checkpoint, recipe)
        other = {}
    if other:
        text = "; ".join(f"{key} is {old!r} there, {new!r} here" for key, (old, new) in other.items())
        branch = ""
        if checkpoint is not None and _can_branch(checkpoint, recipe, other):
            # Another root may lie elsewhere.
            place = {"data.root": (None, recipe.data.root)} if "data.sealed" in other else {}
            branch = f", or branch from it: {branch_command(checkpoint, place | other)}"
        raise UserError(
            f"{folder} holds a run with another recipe ({text}): "
            f"give the same recipe to go on with it, or another --run{branch}"
        )
    return changed_since(saved, recipe)


def changed_since(saved: dict[str, Any], recipe: PretrainRecipe) -> Differences:
    """What a saved recipe has otherwise than this one."""
    found = differences(_with_defaults(saved), recipe.placed().model_dump(mode="json"))
    return {key: pair for key, pair in found.items() if key not in _PLACES}


def paced_by_its_length(recipe: PretrainRecipe) -> bool:
    """Whether the steps of a run depend on how many there will be: to change that would change the past."""
    method, optim = recipe.method, recipe.optim
    averaged = isinstance(method, Classification) and method.ema_start > 0
    return optim.schedule != "constant" or bool(optim.head_first) or isinstance(method, BYOL) or averaged


def branch_command(checkpoint: Path, changes: Mapping[str, tuple[Any, Any]]) -> str:
    """The command that begins another run at a checkpoint, with the second of each two values."""
    words = " ".join(shlex.quote(f"{key}={_text(new)}") for key, (_, new) in changes.items())
    return f"`submit pretrain --from {shlex.quote(str(checkpoint))} {words}`"


def record_change(folder: Path, settings: Differences) -> None:
    """Add a row to changes.jsonl."""
    checkpoint = latest(folder)
    step = 0 if checkpoint is None else step_of(checkpoint)
    change = Change(time=time.time(), user=user_name(), step=step, settings=settings)
    with (folder / "changes.jsonl").open("a") as file:
        file.write(json.dumps(asdict(change)) + "\n")


def read_changes(folder: Path) -> list[Change]:
    """What was changed in a run so far.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / "changes.jsonl"
    try:
        return [_ROW.validate_python(row) for row in read_rows(path)] if path.is_file() else []
    except ValidationError as error:
        raise UserError(f"{path} is damaged: a row of it is no change of a run; remove that line") from error


def differences(there: Any, here: Any, key: str = "") -> Differences:
    """What differs between two trees of plain values, by dotted key."""
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(name, there.get(name), here.get(name)) for name in sorted(there.keys() | here.keys())]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(there, here, strict=True))]
    else:
        return {} if there == here else {key: (there, here)}
    found: Differences = {}
    for name, one, other in pairs:
        found |= differences(one, other, f"{key}.{name}" if key else name)
    return found


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved recipe with the keys that have come since, at their defaults, which train as it was trained."""
    try:
        return PretrainRecipe.model_validate(saved).placed().model_dump(mode="json")
    except ValidationError:
        return saved  # of keys that are gone: what differs is named


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    """What may not change. A dataset is its sealed root, wherever that lies; a test comes after training."""
    try:
        recipe = PretrainRecipe.model_validate(values).placed()
    except ValidationError:
        return values
    found = recipe.identity() | {"evaluation": recipe.evaluation.model_dump(mode="json"), "test": None}
    if found["data"]["sealed"] is not None:
        del found["data"]["root"]
    return found


def _can_branch(checkpoint: Path, recipe: PretrainRecipe, changes: Differences) -> bool:
    ended = recipe.train.steps is not None and recipe.train.steps <= step_of(checkpoint)
    double = "fp64" in changes.get("train.precision", ())
    shaped_by = (*_SHAPED_BY, *BANK_IS_OF) if recipe.method.remembers else _SHAPED_BY
    return not ended and not double and not any(key.startswith(shaped_by) for key in changes)


def _refuse_to_end_before(checkpoint: Path | None, recipe: PretrainRecipe) -> None:
    steps = recipe.train.steps
    if checkpoint is not None and steps is not None and steps < step_of(checkpoint):
        raise UserError(
            f"train.steps is {steps}, and the run has saved step {step_of(checkpoint)} already: "
            "give as many at least, or branch from an older checkpoint with `submit pretrain --from`"
        )


def _text(value: Any) -> str:
    """A value as it is written behind `key=`."""
    return value if isinstance(value, str) else json.dumps(value)
