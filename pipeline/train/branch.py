"""A run that begins where another one was: all tensors of a checkpoint, and other settings.

RUN/parent.json             the run and the step that it left, by whom, and with what changes
RUN/checkpoints/step-N      its tensors, which are the parent's own files, linked; state.json is made anew

From there on it is a run like any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.host import user_name
from cluster.small_file import read_small
from cluster.typed_yaml import apply_override, check_recipe, read_yaml
from pipeline.checkpoint.files import newest_first, step_of
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.steering import BANK_IS_OF, Differences, changed_since, in_words

# What the order of batches is computed from.
_ORDER = (
    "data.sealed",
    "data.view",
    "data.tags",
    "data.batch_size",
    "data.window",
    "seed",
    "train.accumulate",
)
_NO_SPIKE_AFTER = ("data.", "method.", "seed", "train.accumulate")  # losses may be other ones
_MOST_BYTES = 1 << 20
_POSITIVES = re.compile(r"step-\d{8,}-[0-9a-f]{12}")  # the name may be forged: it is to lead nowhere else


@dataclass(frozen=True, kw_only=True)
class Parent:
    """Where a run branched off.

    Attributes:
        run: the folder of the run that it left.
        step: of the checkpoint.
        time: seconds since 1970.
        settings: dotted key → its value there, and here.
    """

    run: str
    step: int
    time: float
    user: str
    settings: Mapping[str, tuple[Any, Any]]

    @property
    def new_order(self) -> tuple[str, ...]:
        """The settings for which other batches follow than in the parent."""
        return tuple(key for key in _ORDER if key in self.settings)

    def changed(self) -> str:
        """The settings, for people."""
        return f"changed: {in_words(self.settings)}" if self.settings else "nothing is changed"

    def __str__(self) -> str:
        return f"{Path(self.run).name} at step {self.step}, by {self.user}; {self.changed()}"


_FILE = TypeAdapter(Parent)


def read_parent(folder: Path) -> Parent | None:
    """What a run branched off from; None if it began at the start.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / "parent.json"
    try:
        return _FILE.validate_json(read_small(path, most=_MOST_BYTES))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(f"{path} is damaged: it names no run and step") from error


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that is meant: RUN/checkpoints/step-N, or the newest one of RUN.

    Raises:
        UserError: naming those that there are.
    """
    run = path if (path / "checkpoints").is_dir() else path.parent.parent
    there = newest_first(run / "checkpoints")
    if run == path and there:
        return there[0]
    number = re.fullmatch(r"step-(\d+)", path.name)
    for checkpoint in there:
        if number and step_of(checkpoint) == int(number[1]):
            return checkpoint
    names = ", ".join(str(checkpoint) for checkpoint in there)
    remedy = f"there are: {names}" if names else "give RUN/checkpoints/step-N, or RUN for its newest"
    raise UserError(f"--from {path}: there is no such checkpoint; {remedy}")


def branch_recipe(checkpoint: Path, overrides: list[str]) -> PretrainRecipe:
    """The recipe of the run that a checkpoint is of, changed; without a name.

    Raises:
        UserError: if that is no recipe.
    """
    saved = checkpoint.parent.parent / "recipe.yaml"
    values = read_yaml(saved)
    check_recipe(PretrainRecipe, values, where=str(saved))
    values["run"]["name"] = None
    # Which root of another dataset is meant, the old pin does not say.
    for section in ("data", "test"):
        if values.get(section) and any(word.startswith(f"{section}.root=") for word in overrides):
            values[section]["sealed"] = None
    for word in overrides:
        apply_override(values, word)
    return check_recipe(PretrainRecipe, values, where=str(saved))


def parent_of(checkpoint: Path, recipe: PretrainRecipe) -> Parent:
    """What a branch with this recipe leaves; nothing is written.

    Raises:
        UserError: naming what of the checkpoint cannot be carried into the new run.
    """
    run = checkpoint.absolute().parent.parent
    changes = changed_since(read_yaml(run / "recipe.yaml"), recipe)
    _refuse_what_cannot_be_carried(checkpoint, recipe, changes)
    return Parent(
        run=str(run), step=step_of(checkpoint), time=time.time(), user=user_name(), settings=changes
    )


def branch(folder: Path, checkpoint: Path, parent: Parent, recipe: PretrainRecipe, recipe_text: str) -> None:
    """Make a run folder whose first checkpoint is another run's; recipe.yaml comes last.

    Raises:
        UserError: if another run is in the folder, or the checkpoint is damaged.
    """
    from pipeline.checkpoint.writer import digest

    target = folder / "checkpoints" / checkpoint.name
    if (folder / "status.json").exists() or {*newest_first(target.parent)} - {target}:
        raise UserError(f"{folder} holds a run that is no branch of {checkpoint}: give another --run")
    state, files = _described(checkpoint)
    temporary = target.with_name(f".saving-{target.name}")
    for left in (temporary, target):  # by a branch that was interrupted
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in files.keys() - {"state.json"}:
        _link(checkpoint / name, temporary / name)
    _fit_state(state, parent, recipe)
    write_atomically(temporary / "state.json", json.dumps(state, indent=2) + "\n")
    files["state.json"] = digest(temporary / "state.json")
    write_atomically(temporary / "manifest.json", json.dumps({"files": files}, indent=2) + "\n")
    temporary.rename(target)
    if (positives := _positives_of(checkpoint, state)) is not None:  # which no tensor holds
        here = folder / "positives" / positives.name
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(positives, here, copy_function=_link)
    write_atomically(folder / "checkpoints" / "latest", f"{target.name}\n")
    for name in ("init_from.json", "classes.json"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(Path(parent.run) / name, folder / name)
    write_atomically(folder / "parent.json", json.dumps(asdict(parent), indent=2) + "\n")
    write_atomically(folder / "recipe.yaml", recipe_text)


def _described(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint's state.json, and what its manifest says of each file; only their sizes are looked at.

    Raises:
        UserError: if it is damaged.
    """
    from pipeline.checkpoint.writer import vouched

    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
        files = vouched(checkpoint)
        sizes = {name: (checkpoint / name).stat().st_size for name in files}
        if not {"samples", "step"} <= state["loader"].keys() or "guard" not in state:
            raise ValueError("state.json is not as it was written")
        if other := [name for name, entry in files.items() if sizes[name] != entry["bytes"]]:
            raise ValueError(f"{other[0]} is not as it was written")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"checkpoint {checkpoint} is broken ({error}): branch from another one") from error
    return state, files


def _fit_state(state: dict[str, Any], parent: Parent, recipe: PretrainRecipe) -> None:
    """Change what a checkpoint knows besides its tensors to what fits the new settings."""
    from pipeline.data.loader import order_identity
    from pipeline.data.order import plan_order
    from pipeline.data.training_set import open_training_set
    from pipeline.train.loss_scale import LossScale

    if parent.new_order:
        data, opened = recipe.data, open_training_set(recipe.data)
        order = plan_order(
            samples=opened.samples, batch_size=data.batch_size, window=data.window, seed=recipe.seed
        )
        identity = order_identity(opened, order, data, targets=recipe.method.supervised)
        state["loader"] = {**identity, "step": state["loader"]["step"]}
    state["guard"]["inherited"] = len(state["guard"]["rollbacks"])
    if any(key.startswith(_NO_SPIKE_AFTER) for key in parent.settings):
        state["guard"]["losses"] = []
    if _seeks_anew(parent.settings):
        state.pop("positives", None)
    if "train.precision" in parent.settings:
        state["loss_scale"] = LossScale(enabled=recipe.train.precision == "fp16").state()


def _refuse_what_cannot_be_carried(checkpoint: Path, recipe: PretrainRecipe, changes: Differences) -> None:
    import torch

    from pipeline.checkpoint.files import METHOD
    from pipeline.checkpoint.metadata import TensorReader
    from pipeline.distributed.sharded import named_tensors
    from pipeline.methods.build import assemble_method

    steps = recipe.train.steps
    if steps is not None and steps <= step_of(checkpoint):
        raise UserError(
            f"train.steps is {steps}, and {checkpoint} has taken {step_of(checkpoint)} already: give more, "
            "train.steps=N, or an older checkpoint"
        )
    double = "fp64" in changes.get("train.precision", ())
    of_some = [*["train.precision"] * double, *BANK_IS_OF * recipe.method.remembers]
    for key in ("method.name", "optim.name", "trunk.name", "trunk.stem", *of_some):
        if key in changes:
            there, here = changes[key]
            raise UserError(
                f"{checkpoint} was trained with {key}={there}, and its tensors are none of {key}={here}: "
                f"a new run may start from its trunk alone, by `submit export {shlex.quote(str(checkpoint))} "
                "OUT` and trunk.init_from=OUT"
            )
    state = _described(checkpoint)[0]
    _refuse_another_half(checkpoint, recipe, samples=state["loader"]["samples"])
    if not _seeks_anew(changes):
        _positives_of(checkpoint, state)
    with torch.device("meta"):
        method = assemble_method(recipe, total_steps=1, group=None, samples=state["loader"]["samples"])
    saved = TensorReader(checkpoint).tensors
    there = {name.removeprefix(METHOD): list(t.size) for name, t in saved.items() if name.startswith(METHOD)}
    here = {name: list(tensor.shape) for name, tensor in named_tensors(method)}
    if different := [name for name in {**here, **there} if here.get(name) != there.get(name)]:
        name = different[0]
        raise UserError(
            f"{checkpoint} does not fit these settings: {name} has the shape {there.get(name, 'of nothing')} "
            f"there, and {here.get(name, 'of nothing')} here; leave out what changes it"
        )


def _refuse_another_half(checkpoint: Path, recipe: PretrainRecipe, *, samples: int) -> None:
    """Refuse a branch on the other side of the step from which on not only the classifier's head learns: the
    optimizer begins anew there, once.
    """
    from pipeline.train.length import optimizer_steps
    from pipeline.train.schedule import steps_of_head_alone

    before = PretrainRecipe.model_validate(read_yaml(checkpoint.parent.parent / "recipe.yaml"))
    if before.optim.head_first is None and recipe.optim.head_first is None:
        return
    length, taken = optimizer_steps(recipe, samples=samples), step_of(checkpoint)
    there = steps_of_head_alone(before.optim, total_steps=optimizer_steps(before, samples=samples))
    here = steps_of_head_alone(recipe.optim, total_steps=length)
    if (taken < there) != (taken < here):
        raise UserError(
            f"only the head learns in the first {there} steps of {checkpoint.parent.parent}, with these "
            f"settings in the first {here}, and {checkpoint.name} lies between: give optim.head_first="
            f"{there / length if there else 'null'}"
        )


def _seeks_anew(changes: Mapping[str, Any]) -> bool:
    """Whether a branch with these changes has other positives than a checkpoint's steps went by."""
    return any(key.startswith("method.cma") for key in changes)


def _positives_of(checkpoint: Path, state: Mapping[str, Any]) -> Path | None:
    """The folder of the positives that a checkpoint's steps went by, if there are any.

    Raises:
        UserError: if it is not there.
    """
    name = state.get("positives")
    if name is None:
        return None
    folder = checkpoint.parents[1] / "positives" / str(name)
    if not _POSITIVES.fullmatch(str(name)) or not folder.is_dir():
        raise UserError(
            f"{checkpoint} went by positives which are not at {folder}: a new run may start from its "
            f"tensors, with train.init_from={shlex.quote(str(checkpoint))}"
        )
    return folder


def _link(source: str | Path, target: str | Path) -> None:
    """The same bytes in both places, without room for two where that can be."""
    try:
        os.link(source, target)
    except OSError:  # another disk, another's file, or a file system that has none
        shutil.copyfile(source, target)
