"""Retrieval: the ranking, and average precision by trapezoids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.recipe.transfer import RetrieveRecipe
from pipeline.transfer.features import Features
from pipeline.transfer.retrieve import ranks_of, retrieve, trapezoids

QUICK = RetrieveRecipe(draws=100)


def features(labels: list[str], x: np.ndarray) -> Features:
    classes = sorted(set(labels))
    y = torch.tensor([classes.index(label) for label in labels])
    return Features(
        x=torch.from_numpy(x).float(), y=y, keys=torch.arange(len(labels)), classes=tuple(classes)
    )


def of_copydays(scores: np.ndarray, right: np.ndarray) -> float:
    """The recipe of INRIA's evaluation, image by image."""
    area, hits = 0.0, 0
    for rank, image in enumerate(np.argsort(-scores)):
        if right[image]:
            left = hits / rank if rank else 1.0
            hits += 1
            area += (left + hits / (rank + 1)) / 2 / right.sum()
    return area


def test_the_mean_is_that_of_an_independent_reference() -> None:
    rng = np.random.default_rng(0)
    labels = [f"picture {number % 12}" for number in range(60)] + ["distractor"] * 100
    database, queries = rng.normal(size=(160, 6)), rng.normal(size=(14, 6))
    asked = [f"picture {number}" for number in range(14)]  # of two of them there is no copy
    found = retrieve(features(labels, database), features(asked, queries), QUICK).metrics()
    near = (queries @ database.T) / np.linalg.norm(database, axis=1)
    expected = [of_copydays(near[n], np.array(labels) == asked[n]) for n in range(12)]
    assert found["map"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert found["map_low"] < found["map"] < found["map_high"]
    assert (found["queries"], found["queries_left_out"], found["database"]) == (12, 2, 160)


def test_the_length_of_features_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(30, 4)), [str(number % 5) for number in range(30)]
    longer = x * rng.uniform(0.1, 9, (30, 1))
    one, other = (retrieve(features(labels, part), features(labels, x), QUICK) for part in (x, longer))
    assert one.mean == pytest.approx(other.mean)


def test_of_equally_similar_images_the_wrong_come_first() -> None:
    similarity, right = torch.tensor([0.5, 0.5, 0.9, 0.5, 0.1]), torch.tensor([1, 0, 1, 0, 0]).bool()
    assert ranks_of(similarity, right).tolist() == [0, 3]
    assert trapezoids(np.array([0, 1, 2])) == 1
    assert trapezoids(np.array([1])) == 0.25
