"""Linear probe: multinomial logistic regression on frozen features, its regularisation chosen on held-out
training data.

Features are standardised with the training set's mean and deviation. That makes one grid of regularisations
fit trunks of any scale (a random trunk, raw pixels). They are then turned onto their principal axes, which
changes neither the loss nor |W|, but lets L-BFGS be told how curved the loss is along each of them: without
that it is slow where the regularisation is weak. Features that have no room in memory are read,
standardised and turned a chunk at a time, in every iteration.

Where several windows of a sample are rows of their own, as of videos, the probabilities of a test sample's
windows are averaged, and all windows of a training sample are held out together or none.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import UserError
from pipeline.recipe.transfer import LinearRecipe
from pipeline.transfer.features import Features
from pipeline.transfer.rows import Axes, Rows, Standardiser, near, refuse_not_finite
from pipeline.transfer.scores import (
    accuracy,
    mean_of_samples,
    shared_labels,
    standing,
    top5_among,
    windows_of,
    with_interval,
)

logger = logging.getLogger(__name__)

WANTED_GAP = 1e-3
_WANTED_GRADIENT = 1e-4  # of each weight: where the regularisation is strong, it asks for more than the gap
_ITERATIONS_BETWEEN_LOOKS = 10


@dataclass(frozen=True, kw_only=True)
class LinearScores:
    """Test accuracies as fractions, and how the regularisation was chosen.

    `validation` maps every regularisation tried to its accuracy on the validation split. `at_edge` says
    that the best one is the smallest or largest tried, so that a wider grid might do better. `gap` is how far
    the loss of the final fit is above the optimum at most, as a share of the loss; `converged` says that this
    is a thousandth or less.
    """

    top1: float
    top5: float
    regularisation: float
    validation: dict[float, float]
    at_edge: bool
    gap: float
    test_samples: int
    classes: int
    standing: dict[str, float]

    @property
    def converged(self) -> bool:
        """Whether the final fit is as good as the optimum, to `WANTED_GAP`."""
        return self.gap <= WANTED_GAP

    def metrics(self) -> dict[str, float]:
        """Flat numbers for receipts and `--json`."""
        return {
            **with_interval(self.top1, self.test_samples),
            **top5_among(self.classes, self.top5),
            "regularisation": self.regularisation,
            **{f"validation_{value:g}": accuracy for value, accuracy in self.validation.items()},
            "at_edge": float(self.at_edge),
            "converged": float(self.converged),
            "gap": min(self.gap, 1.0),  # JSON knows no infinity
            **self.standing,
        }


def linear_probe(
    train: Features, test: Features, recipe: LinearRecipe, *, device: torch.device | None = None
) -> LinearScores:
    """Choose the regularisation on a stratified validation split, refit on all training samples, score the
    test set.

    Raises:
        UserError: if the two sets share no labels, the training set is too small to split, or a feature is
            not finite.
    """
    device = device or torch.device("cpu")
    train_x, test_x = near(train.x, device), near(test.x, device)
    refuse_not_finite(train_x, test_x, device=device)
    names, train_y, test_y = shared_labels(train, test)
    whole = Rows(x=train_x, y=train_y, device=device)
    sample, first = windows_of(train.keys)
    fitted = torch.zeros(len(first), dtype=torch.bool)
    fitted[split_validation(train_y[first], recipe.validation_fraction, recipe.seed)[0]] = True
    kept = fitted[sample]
    inside = replace(whole, kept=kept)
    inside = replace(inside, scaler=Standardiser.of(inside))
    axes = Axes.of(inside)
    inside = replace(inside, axes=axes)
    inside, outside = inside.at_hand(), replace(inside, kept=~kept).at_hand()
    validation: dict[float, float] = {}
    grid = sorted(set(recipe.regularisation), reverse=True)
    solutions: dict[float, Tensor] = {}
    start: Tensor | None = None
    for value in grid:
        # From strong to weak, each from the last one's solution: few iterations each.
        start, _ = fit(inside, len(names), value, recipe.max_iterations, start=start)
        validation[value] = shares_right(outside, start)[0]
        solutions[value] = start
    # Of equals the first, the strongest.
    best = max(grid, key=lambda value: validation[value])
    at_edge = _is_edge(grid, validation, best)
    if at_edge:
        logger.warning(
            "linear probe: the best regularisation %g is at the edge of the grid %g to %g; widen the grid",
            best,
            grid[-1],
            grid[0],
        )
    # The axes stay: they change no loss, and the squares along them hardly.
    whole = replace(whole, scaler=Standardiser.of(whole), axes=axes)
    weights, gap = fit(whole.at_hand(), len(names), best, recipe.max_iterations, start=solutions[best])
    top1, top5 = shares_right(replace(whole, x=test_x, y=test_y), weights, keys=test.keys)
    scores = LinearScores(
        top1=top1,
        top5=top5,
        regularisation=best,
        validation=dict(sorted(validation.items())),
        at_edge=at_edge,
        gap=gap,
        test_samples=len(windows_of(test.keys)[1]),
        classes=len(names),
        standing=standing(train_y[first], test_y[windows_of(test.keys)[1]], len(names)),
    )
    if not scores.converged:
        logger.warning(
            "linear probe: after %d iterations the loss may be %.2g of itself above the optimum; %s",
            recipe.max_iterations,
            gap,
            "raise `max_iterations`" if best else "nothing bounds it without regularisation",
        )
    return scores


def _is_edge(grid: list[float], validation: dict[float, float], best: float) -> bool:
    """Whether values beyond the grid, from strong to weak, might do better: not where the next value inside
    does as well, and not below 0.
    """
    if len(grid) == 1 or best not in (grid[0], grid[-1]):
        return False
    inner = grid[1] if best == grid[0] else grid[-2]
    return best > 0 and validation[best] > validation[inner]


def split_validation(y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to fit on and indices held out: the same share of every class, drawn by the seed.

    A class with a single sample stays in the part that is fitted.
    """
    generator = torch.Generator().manual_seed(seed)
    fitted, held_out = [], []
    for label in range(int(y.max()) + 1):
        members = (y == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(0, len(members) - 1), max(1, round(len(members) * share)))
        held_out.append(members[:count])
        fitted.append(members[count:])
    if sum(map(len, held_out)) == 0:
        raise UserError("a linear probe needs a class with at least two training samples, to hold one out")
    return torch.cat(fitted), torch.cat(held_out)


def fit(
    rows: Rows, classes: int, regularisation: float, max_iterations: int, *, start: Tensor | None = None
) -> tuple[Tensor, float]:
    """Minimise mean cross-entropy + regularisation / 2 * ||W||^2, bias not regularised, by L-BFGS.

    Args:
        rows: the fewer iterations, the less they vary with each other along their axes.
        start: (d + 1, classes) weights to begin from; None for zeros.

    Returns:
        Weights (d + 1, classes), along the axes of `rows` if it has any, the bias last, and their
        `relative_gap`.
    """
    # Along an axis the loss is at most about as curved as this. In units of its root, what is left to find
    # is of one scale in all directions.
    curvature = (rows.squares / classes + regularisation).clamp_min(1e-12)
    scale = torch.cat([curvature, curvature.new_tensor([1 / classes])]).rsqrt()[:, None]
    shape = (len(curvature) + 1, classes)
    inner = curvature.new_zeros(shape) if start is None else start / scale
    optimizer = torch.optim.LBFGS(
        [inner],
        max_iter=_ITERATIONS_BETWEEN_LOOKS,
        history_size=20,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, gradient = loss_and_gradient(rows, inner * scale, regularisation)
        inner.grad = gradient * scale
        return loss

    gap = math.inf
    for _ in range(0, max_iterations, _ITERATIONS_BETWEEN_LOOKS):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        weights = inner * scale
        loss, gradient = loss_and_gradient(rows, weights, regularisation)
        gap = relative_gap(rows, weights, gradient, loss, regularisation)
        if gap <= WANTED_GAP and gradient.abs().max() <= _WANTED_GRADIENT:
            break
    return inner * scale, gap


def loss_and_gradient(rows: Rows, weights: Tensor, regularisation: float) -> tuple[Tensor, Tensor]:
    """What `fit` minimises, a float64 number, and its gradient by weights (d + 1, classes)."""
    loss = 0.5 * regularisation * weights[:-1].double().square().sum()
    gradient = torch.zeros_like(weights, dtype=torch.float64)
    share = 1 / len(rows)
    for x, y in rows:
        logits = _logits(x, weights)
        loss += F.cross_entropy(logits, y, reduction="sum").double() * share
        off = logits.softmax(1)
        off[torch.arange(len(y), device=y.device), y] -= 1
        gradient[:-1] += x.T @ off
        gradient[-1] += off.sum(0)
    gradient *= share
    gradient[:-1] += regularisation * weights[:-1]
    return loss, gradient.to(weights.dtype)


def relative_gap(rows: Rows, weights: Tensor, gradient: Tensor, loss: Tensor, regularisation: float) -> float:
    """How far a loss is above the optimum at most, as a share of it; infinite without regularisation.

    A function whose curvature is c or more lies within |gradient|^2 / (2 c) of its minimum. Along W, c is the
    regularisation; along the bias, which has none, the variance of each class's prediction stands for it, as
    is right near the optimum.
    """
    if not regularisation:
        return math.inf
    variances = weights.new_zeros(weights.shape[1], dtype=torch.float64)
    for x, _ in rows:
        shares = _logits(x, weights).softmax(1)
        variances += (shares * (1 - shares)).sum(0)
    along_bias = (variances / len(rows)).clamp_min(1e-30)
    square = gradient.double().square()
    above = square[:-1].sum() / regularisation + (square[-1] / along_bias).sum()
    return float(above / (2 * loss))


def shares_right(rows: Rows, weights: Tensor, *, keys: Tensor | None = None) -> tuple[float, float]:
    """Shares of the rows whose class is the first, or one of the first five, that the weights say.

    Args:
        keys: (n,) of the samples that rows are windows of, where shares of samples are asked for.
    """
    if keys is not None and len(windows_of(keys)[1]) < len(keys):
        said = torch.cat([_logits(x, weights).softmax(1).cpu() for x, _ in rows])
        votes, first = mean_of_samples(said, keys)
        return accuracy(votes, rows.y[first], 1), accuracy(votes, rows.y[first], 5)
    right = [0.0, 0.0]
    for x, y in rows:
        logits = _logits(x, weights)
        for place, top in enumerate((1, 5)):
            right[place] += accuracy(logits, y, top) * len(y)
    return round(right[0]) / len(rows), round(right[1]) / len(rows)


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[-1], x, weights[:-1])
