"""Linear probe: multinomial logistic regression on frozen features, its regularisation chosen on held-out
training data.

Features are standardised with the training set's mean and deviation. That makes one grid of regularisations
fit trunks of any scale (a random trunk, raw pixels) and conditions the problem well for L-BFGS.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import UserError
from pipeline.recipe.transfer import LinearRecipe
from pipeline.transfer.features import Features
from pipeline.transfer.scores import accuracy, shared_labels, with_interval

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LinearScores:
    """Test accuracies as fractions, and how the regularisation was chosen.

    `validation` maps every regularisation tried to its accuracy on the validation split. `at_edge` says
    that the best one is the smallest or largest tried, so that a wider grid might do better; `converged` is
    about the final fit.
    """

    top1: float
    top5: float
    regularisation: float
    validation: dict[float, float]
    at_edge: bool
    converged: bool
    train_samples: int
    test_samples: int
    classes: int

    def metrics(self) -> dict[str, float]:
        """Flat numbers for receipts and `--json`."""
        return {
            **with_interval(self.top1, self.test_samples),
            "top5": self.top5,
            "regularisation": self.regularisation,
            **{f"validation_{value:g}": accuracy for value, accuracy in self.validation.items()},
            "at_edge": float(self.at_edge),
            "converged": float(self.converged),
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
        UserError: if the two sets share no labels, or the training set is too small to split.
    """
    names, train_y, test_y = shared_labels(train, test)
    device = device or torch.device("cpu")
    x, y = train.x.float().to(device), train_y.to(device)
    fitted, held_out = (part.to(device) for part in split_validation(train_y, recipe))
    validation: dict[float, float] = {}
    grid = sorted(set(recipe.regularisation), reverse=True)
    scaler = Standardiser.of(x[fitted])
    inside, outside = scaler(x[fitted]), scaler(x[held_out])
    weights: Tensor | None = None
    for value in grid:
        # From strong to weak, each from the last one's solution: few iterations each.
        weights, _ = fit(inside, y[fitted], len(names), value, recipe.max_iterations, start=weights)
        validation[value] = accuracy(_logits(outside, weights), y[held_out], 1)
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
    weights, converged = fit(scaler(x), y, len(names), best, recipe.max_iterations, start=weights)
    if not converged:
        logger.warning(
            "linear probe: not converged after %d iterations; raise `max_iterations`", recipe.max_iterations
        )
    logits, target = _logits(scaler(test.x.float().to(device)), weights), test_y.to(device)
    return LinearScores(
        top1=accuracy(logits, target, 1),
        top5=accuracy(logits, target, 5),
        regularisation=best,
        validation=dict(sorted(validation.items())),
        at_edge=at_edge,
        converged=converged,
        train_samples=len(train_y),
        test_samples=len(test_y),
        classes=len(names),
    )


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
) -> tuple[Tensor, bool]:
    """Minimise mean cross-entropy + regularisation / 2 * ||W||^2, bias not regularised, by L-BFGS.

    Args:
        x: (n, d) features, float32 or float64. y: (n,) int64 classes.
        start: (d + 1, classes) weights to begin from; None for zeros.

    Returns:
        Weights (d + 1, classes), the bias last, and whether L-BFGS stopped by itself.
    """
    shape = (x.shape[1] + 1, classes)
    weights = (x.new_zeros(shape) if start is None else start.detach().clone()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=max_iterations,
        max_eval=4 * max_iterations,
        history_size=20,
        tolerance_grad=1e-4,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(x, weights), y) + 0.5 * regularisation * weights[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    iterations = optimizer.state[weights]["n_iter"]
    return weights.detach(), bool(iterations < max_iterations)


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[-1], x, weights[:-1])
