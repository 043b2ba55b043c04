"""Stages whose ranks share out the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_this_process import InThisProcess
from tiny_training import make_dataset

from cluster.local import LocalExecutor
from cluster.typed_yaml import Section
from ingest.dataset.open import open_dataset
from pipeline.dag.ensure import ensure
from pipeline.dag.stage import Kind, Origin, Result, Stage, Work
from pipeline.data.evaluation import Preprocessing
from pipeline.recipe.stages import FeaturesRecipe
from pipeline.recipe.trunk import Architecture
from pipeline.stages.kinds import KINDS
from pipeline.transfer.extract import extract_features
from pipeline.transfer.features import load_features
from pipeline.trunks.baselines import pixels_trunk
from pipeline.trunks.files import TrunkSpec, load_trunk

VIEW = Preprocessing(image_size=16, resize=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class Place(Section):
    path: str


def dataset(work: Work) -> Result:
    return Result({"root": open_dataset(work.recipe.path).root}, [])


def trunk(work: Work) -> Result:
    like = TrunkSpec(architecture=Architecture(name="regnety_tiny"), preprocessing=VIEW, feature_dim=1)
    pixels_trunk(like, size=8, out=work.folder)
    return Result({}, [])


@pytest.mark.slow
def test_features_of_two_ranks_are_those_of_one(tmp_path: Path) -> None:
    data = make_dataset(tmp_path)

    def stage(root: str, kind: str, told: Kind, recipe: Any, **inputs: Origin) -> Stage:
        return Stage(name=kind, kind_name=kind, kind=told, recipe=recipe, inputs=inputs, root=tmp_path / root)

    def made(ranks: int) -> Path:
        root = f"out{ranks}"
        # The dataset lies where it is: the input's path is absolute.
        images = Origin(
            stage=stage(root, "images", Kind(recipe=Place, run=dataset), Place(path=str(data))),
            path=str(data),
        )
        network = Origin(stage=stage(root, "trunk", Kind(recipe=Place, run=trunk), Place(path="")))
        recipe = FeaturesRecipe(run={"workers": 0, "device": "cpu", "ranks_per_node": ranks})
        features = stage(
            root, "features", KINDS["features"], recipe, trunk=network, train=images, test=images
        )
        receipt = ensure(features, InThisProcess() if ranks == 1 else LocalExecutor()).receipt
        assert receipt.metrics == {"train_samples": 96, "test_samples": 96, "feature_dim": 192}
        assert not list(features.folder.glob(".*.part"))
        return features.folder

    one, two = made(1), made(2)
    for name in ("train.safetensors", "test.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    network = load_trunk(next((tmp_path / "out1").glob("trunk-*")))
    expected = extract_features(
        network,
        open_dataset(data),
        preprocessing=network.preprocessing,
        workers=0,
        device=torch.device("cpu"),
    )
    assert torch.equal(load_features(two / "train.safetensors").x, expected.x)
