"""The trunk or the classifier of a run's checkpoint, exported with where it comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from cluster.errors import UserError
from cluster.json_rows import last_row
from cluster.small_file import read_small
from cluster.typed_yaml import load_recipe
from pipeline.checkpoint.files import newest, read_tensors
from pipeline.data.clip.evaluation import AudioPreprocessing, ClipPreprocessing
from pipeline.data.clip.statistics import read_statistics
from pipeline.data.evaluation import evaluation_preprocessing
from pipeline.data.shown import AnyPreprocessing
from pipeline.methods.build import assemble_method
from pipeline.models.trunk import build_trunk, declared
from pipeline.recipe.data import Interpolation
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.trunk import Architecture
from pipeline.trunks.classifier import MOST_BYTES, SPEC, ClassifierSpec, save_classifier
from pipeline.trunks.files import TrunkSpec, load_trunk, refuse_foreign, save_trunk
from pipeline.trunks.formats import Format, save_as

CLASSES = "classes.json"  # of a run that learns from labels: their names, in the order of the logits


def export_trunk(
    run: str | Path,
    out: str | Path,
    *,
    which: Literal["student", "teacher", "audio"] = "student",
    interpolation: Interpolation | None = None,
    format_: Format | None = None,
    force: bool = False,
) -> TrunkSpec:
    """Export the trunk of a run's newest checkpoint, or of the checkpoint given.

    Args:
        run: a run folder, or one of its `checkpoints/step-…`.
        which: the trunk that learns, the one that follows it, or the one for sound.
        interpolation: the filter that resizes the images which it is shown from now on; None: that of the
            run's recipe.
        format_: of another library's, see `pipeline.trunks.formats`; None: ours.
        force: overwrite what another run has left in `out`, or somebody else.

    Raises:
        UserError: if there is no whole checkpoint there, no such trunk in it, or its numbers are not finite.
    """
    opened, out = _open(Path(run)), Path(out)
    if not force and format_ is None:
        refuse_foreign(out, "trunk.json", opened.provenance(which))
    name = opened.name_of(which)
    with torch.device("meta"):
        network = build_trunk(opened.recipe.trunk_section(which))
    tensors = read_tensors(opened.checkpoint, prefix=f"{name}.")
    network.load_state_dict(tensors, strict=True, assign=True)
    network.float().eval()
    spec = TrunkSpec(
        architecture=opened.architecture(which),
        preprocessing=opened.preprocessing(which, interpolation),
        feature_dim=declared(network).feature_dim,
        provenance=opened.provenance(which),
    )
    if format_ is None:
        save_trunk(network, spec, out)
    else:
        save_as(format_, network, spec, out, force=force)
    return spec


def convert_trunk(trunk: Path, out: Path, format_: Format, *, force: bool = False) -> TrunkSpec:
    """Write an exported trunk once more, as a folder of another library.

    Raises:
        UserError: as of `load_trunk` and `save_as`.
    """
    loaded = load_trunk(trunk)
    save_as(format_, loaded.network, loaded.spec, out, force=force)
    return loaded.spec


def export_classifier(
    run: str | Path,
    out: str | Path,
    *,
    which: Literal["student", "teacher"] | None = None,
    interpolation: Interpolation | None = None,
    force: bool = False,
) -> ClassifierSpec:
    """Export the classifier of a run's newest checkpoint, or of the checkpoint given.

    Args:
        which: the one that learns, or its average; by default the average, if the run has one.
        interpolation, force: as of `export_trunk`.

    Raises:
        UserError: if there is no whole checkpoint there, or it is of no classifier, or has no average.
    """
    opened, out = _open(Path(run)), Path(out)
    if not opened.recipe.method.supervised:
        raise UserError(
            f"{opened.run} was trained by {opened.recipe.method.name}, without labels: it has a trunk and no "
            "classifier; `submit finetune` makes one"
        )
    which = which or ("teacher" if "teacher" in opened.trunks else "student")
    if not force:
        refuse_foreign(out, SPEC, opened.provenance(which))
    trunk = opened.name_of(which)
    head = f"{trunk.removesuffix('trunk')}head"  # beside it
    tensors = {
        f"{part}.{name}": tensor
        for part, prefix in (("trunk", trunk), ("head", head))
        for name, tensor in read_tensors(opened.checkpoint, prefix=f"{prefix}.").items()
    }
    spec = ClassifierSpec(
        architecture=opened.architecture(which),
        preprocessing=opened.preprocessing(which, interpolation),
        feature_dim=tensors["head.weight"].shape[1],
        classes=_read_classes(opened.run / CLASSES, count=len(tensors["head.weight"])),
        provenance=opened.provenance(which),
    )
    save_classifier(tensors, spec, out)
    return spec


def _read_classes(path: Path, *, count: int) -> tuple[str, ...]:
    try:
        names = TypeAdapter(tuple[str, ...]).validate_json(read_small(path, most=MOST_BYTES))
        wrong = "" if len(names) == count else f"it names {len(names)} classes, and the head has {count}"
    except (OSError, ValidationError) as error:
        wrong = (error.strerror or str(error)) if isinstance(error, OSError) else "it is no list of names"
    if wrong:
        raise UserError(
            f"{path} does not say what the classes are called ({wrong}): the `submit finetune` that trained "
            "the run, given again with its --run, writes it"
        )
    return names


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A checkpoint, and the run that it is of."""

    run: Path
    checkpoint: Path
    recipe: PretrainRecipe
    trunks: Mapping[str, str]  # which → the name of that module in the method

    def architecture(self, which: str) -> Architecture:
        # Where it started is in the provenance.
        return self.recipe.trunk_section(which).model_copy(update={"init_from": None})

    def preprocessing(self, which: str, interpolation: Interpolation | None) -> AnyPreprocessing:
        data = self.recipe.data
        if which == "audio" and data.audio is not None:
            return AudioPreprocessing.of(data.audio, read_statistics(self.run))
        changes = {} if interpolation is None else {"interpolation": interpolation}
        if data.clip is not None:
            clip = ClipPreprocessing.of(data.clip, data)
            return clip.model_copy(update={"pictures": clip.pictures.model_copy(update=changes)})
        return evaluation_preprocessing(self.recipe).model_copy(update=changes)

    def name_of(self, which: str) -> str:
        if which not in self.trunks:
            raise UserError(
                f"{self.run} was trained by {self.recipe.method.name} without a {which}: "
                f"export --which {' or '.join(self.trunks)}"
            )
        return self.trunks[which]

    def provenance(self, which: str) -> dict[str, Any]:
        found = _provenance(self.run, self.checkpoint, self.recipe)
        return found | ({"which": which} if len(self.trunks) > 1 else {})


def _open(run: Path) -> _Opened:
    checkpoint = run if (run / "manifest.json").is_file() else newest(run)
    run = checkpoint.resolve().parent.parent
    recipe = load_recipe(PretrainRecipe, str(run / "recipe.yaml"), kind="pretrain")
    with torch.device("meta"):
        method = assemble_method(recipe, total_steps=1, group=None)
    names = {module: name for name, module in method.named_modules()}
    trunks = {which: names[trunk] for which, trunk in method.trunks().items()}
    return _Opened(run=run, checkpoint=checkpoint, recipe=recipe, trunks=trunks)


def _last_row(path: Path, *, up_to_step: float = math.inf) -> dict[str, Any]:
    """Nothing of a file that was not copied with the run: the weights are as good without it."""
    return (last_row(path, up_to_step=up_to_step) or {}) if path.is_file() else {}


def _provenance(run: Path, checkpoint: Path, recipe: PretrainRecipe) -> dict[str, Any]:
    state = json.loads((checkpoint / "state.json").read_text())
    things = "videos" if recipe.data.is_of_clips else "images"
    learnt_from = f"labelled {things}" if recipe.method.supervised else f"{things} without labels"
    last = _last_row(run / "metrics.jsonl", up_to_step=state["step"])
    attempt = _last_row(run / "attempts.jsonl")
    warm, parent = run / "init_from.json", run / "parent.json"
    return {
        "what": f"trained on {learnt_from}",
        "method": recipe.method.name,
        "data": state["loader"]["root"],
        "samples": state["loader"]["samples"],
        "images": state["loader"].get("images", state["loader"]["samples"]),  # fewer, if some are repeated
        "steps": state["step"],
        "init_from": json.loads(warm.read_text())["sha256"] if warm.is_file() else None,
        "parent": json.loads(parent.read_text()) if parent.is_file() else None,
        "version": attempt.get("version"),
        "commit": attempt.get("commit", "unknown"),
        "uncommitted_changes": attempt.get("dirty"),
        "metrics": {k: v for k, v in last.items() if isinstance(v, int | float)},
        "recipe": recipe.model_dump(mode="json", exclude={"run"}),
    }
