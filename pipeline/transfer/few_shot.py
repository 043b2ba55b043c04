"""Few-shot classification on frozen features: a linear classifier from a few labelled samples of each class,
again and again with others.

Features are standardised with the mean and deviation of all training samples, which takes no labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from cluster.errors import UserError
from cluster.wording import visible
from pipeline.recipe.transfer import FewShotRecipe
from pipeline.transfer.features import Features
from pipeline.transfer.rows import Rows, Standardiser, refuse_not_finite
from pipeline.transfer.scores import shared_labels
from pipeline.transfer.statistics import Interval, bootstrap


@dataclass(frozen=True, kw_only=True)
class FewShotScores:
    """Accuracy on the test set, the mean over `draws` of labelled samples; `spread` is their deviation."""

    top1: float
    interval: Interval
    spread: float
    shots: int
    draws: int
    classes: int
    test_samples: int

    def metrics(self) -> dict[str, float]:
        """Flat numbers for receipts and `--json`."""
        return {
            "top1": self.top1,
            "top1_low": self.interval.low,
            "top1_high": self.interval.high,
            "spread": self.spread,
            "shots": self.shots,
            "draws": self.draws,
            "classes": self.classes,
            "test_samples": self.test_samples,
        }


def few_shot(
    train: Features, test: Features, recipe: FewShotRecipe, *, device: torch.device | None = None
) -> FewShotScores:
    """Draw labelled samples of every class in training, learn from these alone, and score the test set. It
    runs on the CPU, whatever the device. The interval is over test samples, of the same draws.

    Raises:
        UserError: if the two sets share no labels, a class has fewer samples than `shots`, or a feature is
            not finite.
    """
    names, train_y, test_y = shared_labels(train, test)
    refuse_not_finite(train.x, test.x, device=torch.device("cpu"))
    y, target = train_y.numpy(), test_y.numpy()
    members = [np.flatnonzero(y == label) for label in np.unique(y)]
    fewest = min(members, key=len)
    if len(fewest) < recipe.shots:
        raise UserError(
            f"the training set has {len(fewest)} samples of {visible(names[y[fewest[0]]])}, and shots is "
            f"{recipe.shots}: lower it, or leave that label out with `ingest view`"
        )
    scaler = Standardiser.of(Rows(x=train.x, y=train_y))
    inside, outside = (scaler(part.x.float()).numpy() for part in (train, test))
    rng = np.random.default_rng(recipe.seed)
    right = np.empty((recipe.draws, len(target)))
    for each in right:
        shown = np.concatenate([rng.choice(of_label, recipe.shots, replace=False) for of_label in members])
        learnt = LogisticRegression(C=1 / recipe.regularisation, max_iter=recipe.max_iterations)
        each[:] = learnt.fit(inside[shown], y[shown]).predict(outside) == target
    each_right = right.mean(0)
    return FewShotScores(
        top1=float(right.mean()),
        interval=bootstrap(lambda counts: counts @ each_right / len(target), len(target), seed=recipe.seed),
        spread=float(right.mean(1).std()),
        shots=recipe.shots,
        draws=recipe.draws,
        classes=len(names),
        test_samples=len(target),
    )
