"""A trunk that is there already, as a stage; and the graph that asks what it is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from in_this_process import InThisProcess
from safetensors.torch import save_file
from tiny_classification import recipe_of
from tiny_training import make_dataset

from cluster.errors import UserError
from pipeline.dag.graph import build_graph, run_graph
from pipeline.dag.recipe import DagRecipe, load_dag
from pipeline.dag.stage import Receipt, Work
from pipeline.data.evaluation import Preprocessing
from pipeline.models.trunk import build_trunk, declared
from pipeline.recipe.stages import TrunkRecipe
from pipeline.recipe.trunk import Architecture
from pipeline.stages.kinds import KINDS
from pipeline.stages.trunks import existing, existing_identity
from pipeline.trunks.files import TrunkSpec, load_trunk, read_spec, save_trunk

TINY = Architecture(name="regnety_tiny", stem="low_resolution")


def exported(folder: Path) -> Path:
    """A trunk with drawn weights."""
    network = build_trunk(TINY)
    view = Preprocessing(image_size=16, resize=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    spec = TrunkSpec(architecture=TINY, preprocessing=view, feature_dim=declared(network).feature_dim)
    save_trunk(network, spec, folder)
    return folder


def made(recipe: TrunkRecipe, folder: Path) -> Path:
    folder.mkdir()
    for _ in range(2):  # a killed attempt leaves its files behind
        existing(Work(recipe=recipe, inputs={}, folder=folder))
    return folder


def test_an_exported_trunk_and_a_checkpoint_of_others_become_the_same_files(tmp_path: Path) -> None:
    trunk = exported(tmp_path / "trunk")
    linked = made(TrunkRecipe(path=str(trunk)), tmp_path / "linked")
    assert read_spec(linked) == read_spec(trunk)
    tensors = load_trunk(trunk).network.state_dict()
    theirs = {name: each for name, each in tensors.items() if not name.endswith("num_batches_tracked")}
    save_file(theirs | {"head.fc.weight": torch.ones(3, 8)}, tmp_path / "timm.safetensors")
    recipe = TrunkRecipe(
        path=str(tmp_path / "timm.safetensors"),
        trunk=TINY,
        image_size=16,
        resize=20,
        interpolation="bilinear",
    )
    adopted = made(recipe, tmp_path / "adopted")
    assert read_spec(adopted).preprocessing.resize == 20
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_trunk(adopted)(images), load_trunk(linked)(images))


def test_a_trunk_that_is_none_is_refused_with_the_way_out(tmp_path: Path) -> None:
    trunk = exported(tmp_path / "trunk")
    file = trunk / "trunk.safetensors"
    for recipe, message in (
        (TrunkRecipe(path=str(tmp_path / "gone")), "there is no trunk at"),
        (TrunkRecipe(path=str(file)), "does not say what it is: give its architecture as trunk.name"),
        (TrunkRecipe(path=str(trunk), trunk=TINY), "says itself what it is: leave out `trunk`"),
    ):
        with pytest.raises(UserError, match=message):
            existing_identity(recipe)


@pytest.mark.slow
def test_the_graph_of_a_trunk_runs_to_its_figures(tmp_path: Path) -> None:
    data, trunk = make_dataset(tmp_path), exported(tmp_path / "trunk")
    values = load_dag("transfer", []).model_dump(exclude_unset=True)
    values["folder"] = str(tmp_path / "out")
    stages = values["stages"]
    for name, path in (("train", data), ("test", data), ("trunk", trunk)):
        stages[name]["recipe"] = {"path": str(path)}
    stages["features"]["recipe"] = {"run": {"workers": 0, "device": "cpu"}}
    stages["knn"]["recipe"] = {"k": [5]}
    stages["linear"]["recipe"] = {"regularisation": [0.01]}
    stages["tuned"]["recipe"] = recipe_of(data, {}, train={"epochs": 1}).model_dump(mode="json")
    recipe = DagRecipe.model_validate(values)
    lines: list[str] = []
    results = run_graph(build_graph(recipe, KINDS), InThisProcess(), say=lines.append)
    assert all(isinstance(result, Receipt) for result in results.values()), (lines, results)
    figures, tuned = results["figures"], results["tuned"]
    assert isinstance(figures, Receipt) and isinstance(tuned, Receipt)
    assert figures.metrics == {"top1_tuned": tuned.metrics["top1"], "comparable": 0}
    page = (tmp_path / "out" / "latest" / "figures" / "figures.html").read_text()
    assert "Here: 96 images of 4 classes, 16 px" in page
