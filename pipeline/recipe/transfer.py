"""The recipes of evaluations."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cluster.typed_yaml import Place, Section
from pipeline.recipe.stages import Machines


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


class LinearSgdRecipe(Section):
    """Linear heads on frozen features by SGD with Nesterov momentum: one for each of `rates`, with BatchNorm
    on the features and without, as `batch_norm` says. The best on `validation_fraction` of the training set
    is trained anew on all of it.

    A rate is for batches of 256; it is multiplied by `gamma` at each of `milestones`, shares of the run.
    """

    rates: tuple[PositiveFloat, ...] = Field((0.001, 0.003, 0.01, 0.03, 0.1, 0.3), min_length=1)
    batch_norm: tuple[bool, ...] = Field((True, False), min_length=1)
    batch_size: Annotated[int, Field(ge=2)] = 256
    epochs: PositiveInt = 28
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.285714, 0.571429, 0.857143)
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    seed: NonNegativeInt = 0


AveragePrecision = Literal["interpolated", "eleven_points", "scikit_learn"]


class LowShot(Section):
    """Machines that learn each class from so many images with it, and (classes - 1) times as many without it,
    again with others in each of `samplings`. Few images cannot choose a cost, so it is given.
    """

    shots: tuple[PositiveInt, ...] = Field((1, 2, 4, 8, 16, 32, 64, 96), min_length=1)
    samplings: PositiveInt = 5
    cost: PositiveFloat = 1.0


class SvmRecipe(Section):
    """Linear support vector machines on frozen features, one for each class; each chooses its cost by
    cross-validation on the training set. `average_precision` is the one that counts; all three are told.
    `draws` of test images, by `seed`, make its interval. With `low_shot`, machines that learn from few images
    are scored, too.
    """

    unwritten: ClassVar[frozenset[str]] = frozenset({"low_shot"})

    costs: tuple[PositiveFloat, ...] = Field((0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000), min_length=1)
    folds: Annotated[int, Field(ge=2)] = 3
    max_iterations: PositiveInt = 2000
    average_precision: AveragePrecision = "interpolated"
    low_shot: LowShot | None = None
    draws: Annotated[int, Field(ge=100)] = 1000
    seed: NonNegativeInt = 0


class AudioSvmRecipe(Section):
    """Linear support vector machines with the hinge loss, on features divided by their deviation plus
    `offset`: a feature that hardly varies shall not count as much as others.
    """

    cost: PositiveFloat = 10.0
    offset: NonNegativeFloat = 0.01
    max_iterations: PositiveInt = 1000
    seed: NonNegativeInt = 0


class FewShotRecipe(Section):
    """Logistic regression on `shots` training samples of each class, again with others in each of `draws`."""

    shots: PositiveInt = 5
    draws: PositiveInt = 20
    regularisation: PositiveFloat = 10.0
    max_iterations: PositiveInt = 200
    seed: NonNegativeInt = 0


class RetrieveRecipe(Section):
    """Retrieval by frozen features; `draws` of queries, by `seed`, make its interval."""

    draws: Annotated[int, Field(ge=100)] = 1000
    seed: NonNegativeInt = 0


class Predict(Section):
    """A classifier on a labelled test set; every image is shown once, as `submit export` has written down. Of
    a video so many `windows` are shown, 10 by default, and what is said of them is averaged.

    `classes` is a CSV file with the columns label and class: which classes are right for a label of the test
    set, several in several rows, where they are not called the same. With `only_shared` the classifier may
    only say classes that are right for some image: ImageNet-A, ImageNet-R and ObjectNet have 200, 200 and 113
    of the 1,000.
    """

    unwritten: ClassVar[frozenset[str]] = frozenset({"windows"})

    classes: Place | None = None
    only_shared: bool = False
    windows: PositiveInt | None = None
    batch_size: PositiveInt = 256


class PredictRecipe(Predict):
    """The same as a stage of a graph, whose ranks share out the images."""

    run: Machines = Machines()


class Test(Section):
    """A labelled dataset that a classifier is shown when its training has ended; nothing is chosen by it."""

    root: Place
    sealed: str | None = None
    view: str | None = None
    predict: Predict = Predict()
