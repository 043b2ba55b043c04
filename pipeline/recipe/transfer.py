"""The recipes of evaluations of frozen features."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cluster.typed_yaml import Section


class KnnRecipe(Section):
    """Weighted kNN of Wu et al., 2018 (https://arxiv.org/abs/1805.01978), section 3.4."""

    k: tuple[PositiveInt, ...] = (10, 20, 100, 200)
    temperature: PositiveFloat = 0.1


class LinearRecipe(Section):
    """Logistic regression on frozen features; regularisation is chosen on a split of the training set."""

    regularisation: tuple[NonNegativeFloat, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    max_iterations: PositiveInt = 200
    seed: NonNegativeInt = 0
