"""The trunk of a run's checkpoint, exported with where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from cluster.errors import UserError
from cluster.json_rows import last_row
from cluster.typed_yaml import load_recipe
from pipeline.checkpoint.files import latest, read_tensors
from pipeline.data.evaluation import evaluation_preprocessing
from pipeline.methods.build import assemble_method
from pipeline.models.trunk import build_trunk, declared
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.trunks.files import TrunkSpec, save_trunk


def export_trunk(run: Path, out: Path, *, which: Literal["student", "teacher"] = "student") -> TrunkSpec:
    """Export the trunk of a run's newest checkpoint, or of the checkpoint given.

    Args:
        run: a run folder, or one of its `checkpoints/step-…`.
        which: the trunk that learns, or the one that follows it.

    Raises:
        UserError: if there is no whole checkpoint there, or no teacher in it.
    """
    checkpoint = run if (run / "manifest.json").is_file() else latest(run)
    if checkpoint is None:
        raise UserError(f"{run} holds no checkpoint; give the folder of a run that has saved one")
    run = checkpoint.resolve().parent.parent
    recipe = load_recipe(PretrainRecipe, str(run / "recipe.yaml"), kind="pretrain")
    with torch.device("meta"):
        method = assemble_method(recipe, total_steps=1, group=None)
    trunks = method.trunks()
    if which not in trunks:
        raise UserError(
            f"{run} was trained by {recipe.method.name} without a {which}: "
            f"export --which {' or '.join(trunks)}"
        )
    name = next(name for name, module in method.named_modules() if module is trunks[which])
    with torch.device("meta"):
        network = build_trunk(recipe.trunk)
    network.load_state_dict(read_tensors(checkpoint, prefix=f"{name}."), strict=True, assign=True)
    network.float()
    spec = TrunkSpec(
        architecture=recipe.trunk.model_copy(update={"init_from": None}),  # it is in the provenance
        preprocessing=evaluation_preprocessing(recipe),
        feature_dim=declared(network).feature_dim,
        provenance=_provenance(run, checkpoint, recipe) | ({"which": which} if len(trunks) > 1 else {}),
    )
    save_trunk(network, spec, out)
    return spec


def _provenance(run: Path, checkpoint: Path, recipe: PretrainRecipe) -> dict[str, Any]:
    state = json.loads((checkpoint / "state.json").read_text())
    last = last_row(run / "metrics.jsonl", up_to_step=state["step"]) or {}
    attempt = last_row(run / "attempts.jsonl") or {}
    warm = run / "init_from.json"
    return {
        "what": "pretrained on images without labels",
        "method": recipe.method.name,
        "data": state["loader"]["root"],
        "samples": state["loader"]["samples"],
        "steps": state["step"],
        "init_from": json.loads(warm.read_text())["sha256"] if warm.is_file() else None,
        "version": attempt["version"],
        "commit": attempt["commit"],
        "uncommitted_changes": attempt["dirty"],
        "metrics": {k: v for k, v in last.items() if isinstance(v, int | float)},
        "recipe": recipe.model_dump(mode="json", exclude={"run"}),
    }
