"""Support vector machines that learn each class from a few images with it, again and again from others.

The protocol of VISSL for PASCAL VOC 2007: for each class k images that have it, and (classes - 1) · k that do
not; those to ignore for it are in neither. The cost is given: VISSL takes the best on the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.svm import LinearSVC

from cluster.errors import UserError
from cluster.host import CORES
from cluster.wording import visible
from pipeline.recipe.transfer import LowShot, SvmRecipe
from pipeline.transfer.average_precision import mean_of_classes, of_classes


@dataclass(frozen=True, kw_only=True)
class OfShots:
    """Mean average precision from so many images of each class: its mean and deviation over samplings."""

    shots: int
    mean: float
    spread: float

    def metrics(self) -> dict[str, float]:
        return {f"map_{self.shots}_shots": self.mean, f"spread_{self.shots}_shots": self.spread}


def low_shot(
    machine: LinearSVC,
    recipe: SvmRecipe,
    *,
    x: NDArray[np.float64],
    learnt: NDArray[np.int8],
    outside: NDArray[np.float64],
    asked: NDArray[np.int8],
    classes: Sequence[str],
) -> tuple[OfShots, ...]:
    """Draw images of every class, learn from these alone, and rank the test images.

    Args:
        machine: of which each class has its own.
        x, outside: features of training and test images.
        learnt, asked: (n, classes) of both, 1 where an image has the class, -1 where it is to be ignored.

    Raises:
        UserError: if a class has fewer images than are to be drawn.
    """
    assert recipe.low_shot is not None
    _refuse_few(learnt, classes, recipe.low_shot)
    once = np.ones((1, len(outside)), np.int64)

    def score(shots: int, sampling: int) -> float:
        rng = np.random.default_rng([recipe.seed, shots, sampling])
        ranks = []
        for target in learnt.T:
            shown = _draw(target, shots, len(classes), rng)
            fit = clone(machine).fit(x[shown], np.where(target[shown] > 0, 1, -1))
            ranks.append(fit.decision_function(outside))
        each = of_classes(np.stack(ranks, axis=1), asked, once, definition=recipe.average_precision)
        return float(mean_of_classes(each)[0])

    found = []
    with ThreadPoolExecutor(CORES) as pool:  # scikit-learn lets other threads run
        for shots in recipe.low_shot.shots:
            of_samplings = list(
                pool.map(lambda each, k=shots: score(k, each), range(recipe.low_shot.samplings))
            )
            found.append(
                OfShots(shots=shots, mean=float(np.mean(of_samplings)), spread=float(np.std(of_samplings)))
            )
    return tuple(found)


def _draw(target: NDArray[np.int8], shots: int, classes: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Training images for one of so many classes, some with it and some without, as `target` says."""
    inside, without = np.flatnonzero(target > 0), np.flatnonzero(target == 0)
    others = min(max(classes - 1, 1) * shots, len(without))
    return np.concatenate(
        [rng.choice(inside, shots, replace=False), rng.choice(without, others, replace=False)]
    )


def _refuse_few(learnt: NDArray[np.int8], classes: Sequence[str], low_shot: LowShot) -> None:
    most = max(low_shot.shots)
    having = (learnt > 0).sum(0)
    least = int(having.argmin())
    if having[least] < most:
        raise UserError(
            f"the training set has {int(having[least])} images of {visible(classes[least])}, and "
            f"low_shot.shots asks for {most}: leave out what is more, as low_shot.shots=[1,2,4]"
        )
    lacking = (learnt == 0).sum(0)
    if not lacking.all():
        raise UserError(
            f"every training image has {visible(classes[int(lacking.argmin())])} or is to be ignored for it, "
            "so that nothing can be learnt from a few: leave out low_shot"
        )
