"""The stages that make trunks of checkpoints, and the baselines beside them."""

from __future__ import annotations

from pathlib import Path

import torch

from cluster.errors import UserError
from cluster.rank.torch_dist import choose_device
from pipeline.dag.digests import folder_identity
from pipeline.dag.stage import Result, Work
from pipeline.data.evaluation import Preprocessing
from pipeline.models.trunk import build_trunk, declared
from pipeline.recipe.data import Data
from pipeline.recipe.stages import ExportRecipe, TrunkRecipe
from pipeline.stages.inputs import opened
from pipeline.stages.machine import gpus_held
from pipeline.trunks.baselines import pixels_trunk, random_trunk
from pipeline.trunks.export import export_trunk
from pipeline.trunks.files import TrunkSpec, read_spec, save_trunk
from pipeline.trunks.interop import read_weights

TRUNK_FILES = ["trunk.safetensors", "trunk.json", "README.md"]


def existing(work: Work) -> Result:
    """Links to the files of an exported trunk; or such files, made of a checkpoint of others."""
    recipe: TrunkRecipe = work.recipe
    path = _existing_path(recipe)
    if path.is_dir():
        spec = read_spec(path)
        for name in TRUNK_FILES:
            link = work.folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(path.absolute() / name)
        return Result({"feature_dim": spec.feature_dim}, TRUNK_FILES)
    assert recipe.trunk is not None
    section = recipe.trunk.model_copy(update={"init_from": None})
    with torch.device("meta"):
        network = build_trunk(section)
    weights = read_weights(section.model_copy(update={"init_from": str(path)}))
    counts = network.state_dict().keys() - weights.keys()  # of batches that BatchNorm has seen
    network.load_state_dict(weights | {name: torch.tensor(0) for name in counts}, strict=True, assign=True)
    spec = TrunkSpec(
        architecture=section,
        preprocessing=Preprocessing(
            image_size=recipe.image_size,
            resize=recipe.resize,
            interpolation=recipe.interpolation,
            mean=Data.model_fields["mean"].default,
            std=Data.model_fields["std"].default,
        ),
        feature_dim=declared(network).feature_dim,
        provenance={"what": f"weights of others, from {path.name}"},
    )
    save_trunk(network.float(), spec, work.folder)
    return Result({"feature_dim": spec.feature_dim}, TRUNK_FILES)


def existing_identity(recipe: TrunkRecipe) -> str:
    """What a trunk is: names, sizes and times of its files."""
    return folder_identity(_existing_path(recipe))


def _existing_path(recipe: TrunkRecipe) -> Path:
    path = Path(recipe.path)
    if not path.exists():
        raise UserError(
            f"there is no trunk at {path}: give the folder of an exported one (`submit export`) as path, or "
            "a file of others' weights with trunk.name"
        )
    if path.is_dir() == (recipe.trunk is not None):
        raise UserError(
            f"{path} is a folder, and an exported trunk says itself what it is: leave out `trunk`"
            if path.is_dir()
            else f"{path} is a file, which does not say what it is: give its architecture as trunk.name"
        )
    return path


def export(work: Work) -> Result:
    """An exported trunk, from the run's newest checkpoint."""
    recipe: ExportRecipe = work.recipe
    spec = export_trunk(
        work.inputs["run"].path,
        work.folder,
        which=recipe.which,
        interpolation=recipe.interpolation,
        force=True,  # the folder is the stage's own
    )
    return Result({"feature_dim": spec.feature_dim, "steps": spec.provenance["steps"]}, TRUNK_FILES)


def random(work: Work) -> Result:
    """The same architecture with drawn weights, calibrated on the training images."""
    device = choose_device(work.recipe.run.device)
    spec = read_spec(work.inputs["like"].path)
    random_trunk(
        spec,
        opened(work.inputs["data"]),
        seed=work.recipe.seed,
        out=work.folder,
        workers=work.recipe.run.workers,
        device=device,
    )
    return Result({"feature_dim": spec.feature_dim}, TRUNK_FILES, gpus_held(device))


def pixels(work: Work) -> Result:
    """Raw pixels as a trunk."""
    spec = pixels_trunk(read_spec(work.inputs["like"].path), size=work.recipe.size, out=work.folder)
    return Result({"feature_dim": spec.feature_dim}, TRUNK_FILES)
