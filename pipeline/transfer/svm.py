"""A linear support vector machine for each class, on frozen features of images that may have several labels.

The protocol of VISSL for PASCAL VOC 2007: features of length one, squared hinge loss, positives weighted
twice, the cost chosen for each class by cross-validation on the training set. An image for which a class is
to be ignored counts as one without it in training, and not at all in the test of that class.
"""

from __future__ import annotations

import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from cluster.errors import UserError
from cluster.host import CORES
from cluster.wording import visible
from pipeline.recipe.transfer import AveragePrecision, SvmRecipe
from pipeline.transfer.average_precision import mean_of_classes, of_classes
from pipeline.transfer.features import Features
from pipeline.transfer.labels import labels_in
from pipeline.transfer.low_shot import OfShots, low_shot
from pipeline.transfer.statistics import Interval, bootstrap

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SvmScores:
    """What was found of each class, in the order of `classes`.

    Attributes:
        average_precision: by each definition, of each class.
        definition: the one that counts; `interval` is that of its mean over classes.
        costs: chosen for each class.
        at_edge: classes whose best cost was the least or largest, so that a wider grid might do better.
        unconverged: classes whose fit had reached `max_iterations`.
        left_out: labels that lack an image with or without them in training, or one with them in the test.
        low_shot: what machines that learn from few images score, where the recipe asks for them.
    """

    classes: tuple[str, ...]
    average_precision: dict[AveragePrecision, NDArray[np.float64]]
    definition: AveragePrecision
    interval: Interval
    costs: tuple[float, ...]
    at_edge: int
    unconverged: int
    left_out: int
    low_shot: tuple[OfShots, ...]
    train_samples: int
    test_samples: int

    def metrics(self) -> dict[str, float]:
        """Flat numbers for receipts and `--json`: `map` is the mean over classes."""
        found = {name: float(each.mean()) for name, each in self.average_precision.items()}
        of_classes = self.average_precision[self.definition].tolist()
        return {
            "map": found[self.definition],
            "map_low": self.interval.low,
            "map_high": self.interval.high,
            **{f"map_{name}": value for name, value in found.items()},
            **{f"ap_{name}": value for name, value in zip(self.classes, of_classes, strict=True)},
            **{f"cost_{name}": value for name, value in zip(self.classes, self.costs, strict=True)},
            **{name: value for each in self.low_shot for name, value in each.metrics().items()},
            "at_edge": self.at_edge,
            "unconverged": self.unconverged,
            "classes": len(self.classes),
            "labels_left_out": self.left_out,
            "train_samples": self.train_samples,
            "test_samples": self.test_samples,
        }


def svm(
    train: Features, test: Features, recipe: SvmRecipe, *, device: torch.device | None = None
) -> SvmScores:
    """Choose each class's cost on the training set, fit on all of it, and rank the test images. It runs on
    the CPU, on all cores, whatever the device.

    Raises:
        UserError: if the two sets share no label, a class has too few training images to choose its cost,
            or a feature is not finite.
    """
    x, outside = (_of_length_one(part) for part in (train, test))
    names, learnt, asked = _targets(train, test)
    has = learnt > 0
    scored = np.flatnonzero(has.any(0) & ~has.all(0) & (asked > 0).any(0))
    if not len(scored):
        raise UserError(
            "the training and the test set share no label that only some of the training images have; were "
            "both crawled with labels of one kind, as --labels-from or --labels say?"
        )
    classes = [names[each] for each in scored]
    has, asked = has[:, scored], asked[:, scored]
    of_few: tuple[OfShots, ...] = ()
    if recipe.low_shot is not None:
        machine = _machine(recipe.low_shot.cost, recipe)
        of_few = low_shot(
            machine, recipe, x=x, learnt=learnt[:, scored], outside=outside, asked=asked, classes=classes
        )
    if len(recipe.costs) > 1:
        _refuse_few(classes, has, recipe)
    costs, fits = _fit_all(x, has, recipe)
    ranks = np.stack([fit.decision_function(outside) for fit in fits], axis=1)
    once = np.ones((1, len(outside)), np.int64)
    edges = (min(recipe.costs), max(recipe.costs)) if len(recipe.costs) > 1 else ()
    scores = SvmScores(
        classes=tuple(classes),
        average_precision={
            name: of_classes(ranks, asked, once, definition=name)[0] for name in get_args(AveragePrecision)
        },
        definition=recipe.average_precision,
        interval=bootstrap(
            lambda counts: mean_of_classes(
                of_classes(ranks, asked, counts, definition=recipe.average_precision)
            ),
            len(outside),
            draws=recipe.draws,
            seed=recipe.seed,
        ),
        costs=tuple(costs),
        at_edge=sum(cost in edges for cost in costs),
        unconverged=sum(bool(np.max(fit.n_iter_) >= recipe.max_iterations) for fit in fits),
        left_out=len(names) - len(scored),
        low_shot=of_few,
        train_samples=len(x),
        test_samples=len(outside),
    )
    if scores.unconverged:
        logger.warning(
            "svm: %d of %d classes did not converge; raise max_iterations, or leave out the largest costs",
            scores.unconverged,
            len(scored),
        )
    return scores


def _of_length_one(part: Features) -> NDArray[np.float64]:
    x = part.x.double().numpy()
    if not np.isfinite(x).all():
        raise UserError(
            "the features hold numbers that are not finite, which no classifier can use: the trunk has "
            "diverged; export it from an older checkpoint"
        )
    normal: NDArray[np.float64] = x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)
    return normal


def _targets(train: Features, test: Features) -> tuple[list[str], NDArray[np.int8], NDArray[np.int8]]:
    """All labels, sorted; and of both parts, (n, labels): 1 where an image has it, -1 where it is ignored."""
    sets = [[labels_in(name) for name in part.classes] for part in (train, test)]
    names = sorted({label for of_part in sets for right, _ in of_part for label in right})
    place = {name: index for index, name in enumerate(names)}
    found = []
    for part, of_part in zip((train, test), sets, strict=True):
        table = np.zeros((len(of_part), len(names)), np.int8)
        for row, (right, ignored) in zip(table, of_part, strict=True):
            row[[place[label] for label in right]] = 1
            row[[place[label] for label in ignored if label in place]] = -1
        found.append(table[part.y.numpy()])
    return names, found[0], found[1]


def _refuse_few(names: list[str], has: NDArray[np.bool_], recipe: SvmRecipe) -> None:
    """Every fold must have images with and without the class."""
    fewest = np.minimum(has.sum(0), (~has).sum(0))
    least = int(fewest.argmin())
    if fewest[least] < recipe.folds:
        raise UserError(
            f"{int(fewest[least])} training images decide about {visible(names[least])}, too few to choose "
            f"its cost by folds={recipe.folds}: lower folds, to 2 at least, or give one cost, as costs=[1]"
        )


def _fit_all(
    x: NDArray[np.float64], has: NDArray[np.bool_], recipe: SvmRecipe
) -> tuple[list[float], list[LinearSVC]]:
    """Each class's cost, and its machine."""
    signs = np.where(has, 1, -1).T
    with warnings.catch_warnings(), ThreadPoolExecutor(CORES) as pool:  # scikit-learn lets other threads run
        warnings.simplefilter("ignore", ConvergenceWarning)
        costs = list(pool.map(lambda sign: _best_cost(x, sign, recipe), signs))
        fits = list(pool.map(lambda sign, cost: _machine(cost, recipe).fit(x, sign), signs, costs))
    return costs, fits


def _best_cost(x: NDArray[np.float64], sign: NDArray[np.int64], recipe: SvmRecipe) -> float:
    """Of equals the least, which is the strongest regularisation."""
    grid = sorted(set(recipe.costs))
    if len(grid) == 1:
        return grid[0]
    found = [
        cross_val_score(_machine(cost, recipe), x, sign, cv=recipe.folds, scoring="average_precision").mean()
        for cost in grid
    ]
    return grid[int(np.argmax(found))]


def _machine(cost: float, recipe: SvmRecipe) -> LinearSVC:
    # The primal problem has the dual's solution, and is solved where costs are large, too.
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=False, tol=1e-4, max_iter=recipe.max_iterations)
