"""What a score stands on is said: images on both sides, classes that one side lacks, numbers of no use."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tiny_training import make_dataset
from torch import nn
from typer.testing import CliRunner

from cluster.errors import UserError
from ingest.dataset.open import open_dataset
from pipeline.cli import app
from pipeline.data.evaluation import Preprocessing
from pipeline.recipe.transfer import KnnRecipe, LinearRecipe
from pipeline.transfer.extract import extract_features, warn_of_shared
from pipeline.transfer.features import Features
from pipeline.transfer.knn import knn
from pipeline.transfer.linear import _is_edge, linear_probe

CPU = torch.device("cpu")
VIEW = Preprocessing(image_size=16, resize=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), images=24)


def features(labels: str, *, classes: int = 0) -> Features:
    """A point for each letter, its class, near to those of its class; and further classes without a point."""
    names = sorted({*labels, *(f"z{number}" for number in range(classes))})
    generator = torch.Generator().manual_seed(len(labels))
    y = torch.tensor([names.index(letter) for letter in labels])
    centres = torch.nn.functional.one_hot(torch.tensor([ord(letter) - 97 for letter in labels]), 8).float()
    x = centres + 0.01 * torch.randn(len(labels), 8, generator=generator)
    return Features(x=x, y=y, keys=torch.arange(len(labels)), classes=tuple(names))


def test_test_images_of_classes_that_training_lacks_are_told(caplog: pytest.LogCaptureFixture) -> None:
    train, test = features("aaaabbbbcccc"), features("aabbddde")
    for found in (
        knn(train, test, KnnRecipe(k=(1,))).metrics(),
        linear_probe(train, test, LinearRecipe(regularisation=(1e-3,))).metrics(),
    ):
        assert found["top1"] == 0.5
        assert found["classes_without_training"] == 2
        assert found["classes_without_test"] == 1
        assert found["test_samples_without_training"] == 4
        assert "top5" not in found  # of five classes
    assert "4 of 8 test images have one of 2 labels that no training image has (d, e)" in caplog.text


def test_top5_is_told_of_more_than_five_classes() -> None:
    found = knn(features("abcdefabcdef"), features("abcdef"), KnnRecipe(k=(1,))).metrics()
    assert found["top5"] == 1.0


def test_ties_are_told() -> None:
    train = features("ab")
    flat = Features(x=torch.ones(2, 8), y=train.y, keys=train.keys, classes=train.classes)
    assert knn(flat, flat, KnnRecipe(k=(2,))).metrics()["tied"] == 1.0
    assert knn(train, train, KnnRecipe(k=(1,))).metrics()["tied"] == 0.0


def test_an_edge_is_where_a_wider_grid_might_do_better() -> None:
    grid = [1.0, 0.1, 0.0]
    assert _is_edge(grid, {1.0: 0.9, 0.1: 0.8, 0.0: 0.7}, 1.0)
    assert not _is_edge(grid, {1.0: 0.9, 0.1: 0.9, 0.0: 0.9}, 1.0)  # of equals
    assert not _is_edge(grid, {1.0: 0.7, 0.1: 0.8, 0.0: 0.9}, 0.0)  # nothing lies below 0
    assert _is_edge([1.0, 0.1], {1.0: 0.7, 0.1: 0.8}, 0.1)
    assert not _is_edge([1.0], {1.0: 0.7}, 1.0)


def test_testing_on_training_images_is_told(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_shared(open_dataset(data), open_dataset(data))
    assert "24 of 24 test images are training images, too" in caplog.text


class Broken(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) / 0


def test_features_that_are_not_finite_are_no_features(data: Path) -> None:
    with pytest.raises(UserError, match="are not finite: its weights are broken"):
        extract_features(Broken(), open_dataset(data), preprocessing=VIEW, workers=0, device=CPU)


def test_too_many_neighbours_are_told_before_the_images_are_looked_at(data: Path) -> None:
    words = ["knn", "no-such-trunk", "--train", str(data), "--test", str(data), "k=[25]"]
    told = CliRunner().invoke(app, words, prog_name="submit")
    assert told.exit_code == 2
    assert "k=25 needs as many training samples, and there are 24" in told.output
