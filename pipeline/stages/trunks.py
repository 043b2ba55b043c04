"""The stages that make trunks of checkpoints, and the baselines beside them."""

from __future__ import annotations

from cluster.rank.torch_dist import choose_device
from pipeline.dag.stage import Result, Work
from pipeline.recipe.stages import ExportRecipe
from pipeline.stages.inputs import opened
from pipeline.stages.machine import gpus_held
from pipeline.trunks.baselines import pixels_trunk, random_trunk
from pipeline.trunks.export import export_trunk
from pipeline.trunks.files import read_spec

TRUNK_FILES = ["trunk.safetensors", "trunk.json", "README.md"]


def export(work: Work) -> Result:
    """An exported trunk, from the run's newest checkpoint."""
    recipe: ExportRecipe = work.recipe
    spec = export_trunk(
        work.inputs["run"].path, work.folder, which=recipe.which, interpolation=recipe.interpolation
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
