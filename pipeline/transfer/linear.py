"""Linear probe: multinomial logistic regression on frozen features, its regularisation chosen on held-out
training data.

Features are standardised with the training set's mean and deviation. That makes one grid of regularisations
fit trunks of any scale (a random trunk, raw pixels). They are then turned onto their principal axes, which
changes neither the loss nor |W|, but lets L-BFGS be told how curved the loss is along each of them: without
that it is slow where the regularisation is weak.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import UserError
from pipeline.recipe.transfer import LinearRecipe
from pipeline.transfer.features import Features
from pipeline.transfer.scores import accuracy, shared_labels, with_interval

logger = logging.getLogger(__name__)

WANTED_GAP = 1e-3
_WANTED_GRADIENT = 1e-4  # of each weight: where the regularisation is strong, it asks for more than the gap
_ITERATIONS_BETWEEN_LOOKS = 10
_ROWS = 65_536


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
    train_samples: int
    test_samples: int
    classes: int

    @property
    def converged(self) -> bool:
        """Whether the final fit is as good as the optimum, to `WANTED_GAP`."""
        return self.gap <= WANTED_GAP

    def metrics(self) -> dict[str, float]:
        """Flat numbers for receipts and `--json`."""
        return {
            **with_interval(self.top1, self.test_samples),
            "top5": self.top5,
            "regularisation": self.regularisation,
            **{f"validation_{value:g}": accuracy for value, accuracy in self.validation.items()},
            "at_edge": float(self.at_edge),
            "converged": float(self.converged),
            "gap": min(self.gap, 1.0),  # JSON knows no infinity
            "train_samples": self.train_samples,
            "test_samples": self.test_samples,
            "classes": self.classes,
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
    if not all(part.x.isfinite().all() for part in (train, test)):
        raise UserError(
            "the features hold numbers that are not finite, which no classifier can use: the trunk has "
            "diverged; export it from an older checkpoint"
        )
    names, train_y, test_y = shared_labels(train, test)
    device = device or torch.device("cpu")
    x, y = train.x.float().to(device), train_y.to(device)
    fitted, held_out = (part.to(device) for part in split_validation(train_y, recipe))
    validation: dict[float, float] = {}
    grid = sorted(set(recipe.regularisation), reverse=True)
    scaler = Standardiser.of(x[fitted])
    inside = scaler(x[fitted])
    axes = principal_axes(inside)
    inside, outside = inside @ axes, scaler(x[held_out]) @ axes
    solutions: dict[float, Tensor] = {}
    start: Tensor | None = None
    for value in grid:
        # From strong to weak, each from the last one's solution: few iterations each.
        start, _ = fit(inside, y[fitted], len(names), value, recipe.max_iterations, start=start)
        validation[value] = accuracy(_logits(outside, start), y[held_out], 1)
        solutions[value] = start
    # Of equals the first, the strongest.
    best = max(grid, key=lambda value: validation[value])
    at_edge = len(grid) > 1 and best in (grid[0], grid[-1])
    if at_edge:
        logger.warning(
            "linear probe: the best regularisation %g is at the edge of the grid %g to %g; widen the grid",
            best,
            grid[-1],
            grid[0],
        )
    scaler = Standardiser.of(x)
    weights, gap = fit(scaler(x) @ axes, y, len(names), best, recipe.max_iterations, start=solutions[best])
    logits, target = _logits(scaler(test.x.float().to(device)) @ axes, weights), test_y.to(device)
    scores = LinearScores(
        top1=accuracy(logits, target, 1),
        top5=accuracy(logits, target, 5),
        regularisation=best,
        validation=dict(sorted(validation.items())),
        at_edge=at_edge,
        gap=gap,
        train_samples=len(train_y),
        test_samples=len(test_y),
        classes=len(names),
    )
    if not scores.converged:
        logger.warning(
            "linear probe: after %d iterations the loss may be %.2g of itself above the optimum; %s",
            recipe.max_iterations,
            gap,
            "raise `max_iterations`" if best else "nothing bounds it without regularisation",
        )
    return scores


@dataclass(frozen=True)
class Standardiser:
    """Zero mean and unit deviation per feature; a feature that never varies becomes zero."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Standardiser:
        """From (n, d) training features."""
        deviation, mean = torch.std_mean(x.double(), dim=0, correction=0)
        constant = deviation <= 1e-6 * mean.abs().clamp_min(1e-30)
        scale = torch.where(constant, 0.0, 1 / deviation.clamp_min(1e-30))
        return cls(mean.to(x.dtype), scale.to(x.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale


def principal_axes(x: Tensor) -> Tensor:
    """The directions, (d, d), along which (n, d) features of zero mean do not covary."""
    covariance = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for start in range(0, len(x), _ROWS):  # in float64 not all may have room at once
        rows = x[start : start + _ROWS].double()
        covariance += rows.T @ rows
    axes: Tensor = torch.linalg.eigh(covariance).eigenvectors
    return axes.to(x.dtype)


def split_validation(y: Tensor, recipe: LinearRecipe) -> tuple[Tensor, Tensor]:
    """Indices to fit on and indices held out: the same share of every class, drawn by the recipe's seed.

    A class with a single sample stays in the part that is fitted.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    fitted, held_out = [], []
    for label in range(int(y.max()) + 1):
        members = (y == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(0, len(members) - 1), max(1, round(len(members) * recipe.validation_fraction)))
        held_out.append(members[:count])
        fitted.append(members[count:])
    if sum(map(len, held_out)) == 0:
        raise UserError("a linear probe needs a class with at least two training samples, to hold one out")
    return torch.cat(fitted), torch.cat(held_out)


def fit(
    x: Tensor,
    y: Tensor,
    classes: int,
    regularisation: float,
    max_iterations: int,
    *,
    start: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Minimise mean cross-entropy + regularisation / 2 * ||W||^2, bias not regularised, by L-BFGS.

    Args:
        x: (n, d) features, float32 or float64; the fewer iterations, the less they vary with each other.
        y: (n,) int64 classes.
        start: (d + 1, classes) weights to begin from; None for zeros.

    Returns:
        Weights (d + 1, classes), the bias last, and their `relative_gap`.
    """
    # Along a feature the loss is at most about as curved as this. In units of its root, what is left to find
    # is of one scale in all directions.
    curvature = (x.square().mean(0) / classes + regularisation).clamp_min(1e-12)
    scale = torch.cat([curvature, curvature.new_tensor([1 / classes])]).rsqrt()[:, None]
    shape = (x.shape[1] + 1, classes)
    inner = (x.new_zeros(shape) if start is None else start / scale).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [inner],
        max_iter=_ITERATIONS_BETWEEN_LOOKS,
        history_size=20,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weights = inner * scale
        loss = F.cross_entropy(_logits(x, weights), y) + 0.5 * regularisation * weights[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    gap = math.inf
    for _ in range(0, max_iterations, _ITERATIONS_BETWEEN_LOOKS):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        loss = closure().detach()
        assert inner.grad is not None
        gradient = inner.grad / scale
        gap = relative_gap(x, (inner * scale).detach(), gradient, loss, regularisation)
        if gap <= WANTED_GAP and gradient.abs().max() <= _WANTED_GRADIENT:
            break
    return (inner * scale).detach(), gap


def relative_gap(x: Tensor, weights: Tensor, gradient: Tensor, loss: Tensor, regularisation: float) -> float:
    """How far a loss is above the optimum at most, as a share of it; infinite without regularisation.

    A function whose curvature is c or more lies within |gradient|^2 / (2 c) of its minimum. Along W, c is the
    regularisation; along the bias, which has none, the variance of each class's prediction stands for it, as
    is right near the optimum.
    """
    if not regularisation:
        return math.inf
    probabilities = _logits(x, weights).softmax(1)
    along_bias = (probabilities * (1 - probabilities)).mean(0).double().clamp_min(1e-30)
    square = gradient.double().square()
    above = square[:-1].sum() / regularisation + (square[-1] / along_bias).sum()
    return float(above / (2 * loss))


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[-1], x, weights[:-1])
