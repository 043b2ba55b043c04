"""Linear heads on frozen features, trained side by side by SGD: each rate, with and without BatchNorm before
the linear layer, is a head of its own. All see the same batches, so that features are read once for all of
them. The head is chosen on held-out training images, and trained anew on all of them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.recipe.transfer import LinearSgdRecipe
from pipeline.transfer.features import Features
from pipeline.transfer.linear import split_validation
from pipeline.transfer.rows import Rows, in_batches, near, refuse_not_finite
from pipeline.transfer.scores import accuracy, shared_labels, with_interval

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """One head: its peak rate for a batch of 256, and whether features are normalised before it."""

    rate: float
    batch_norm: bool

    def __str__(self) -> str:
        return f"{'batch_norm' if self.batch_norm else 'plain'}_{self.rate:g}"


@dataclass(frozen=True, kw_only=True)
class LinearSgdScores:
    """Test accuracies as fractions, and how the head was chosen: `validation` maps each to its accuracy on
    held-out training images. `at_edge` says that its rate is the smallest or largest that was tried.
    """

    top1: float
    top5: float
    chosen: Setting
    validation: dict[Setting, float]
    at_edge: bool
    train_samples: int
    test_samples: int
    classes: int

    def metrics(self) -> dict[str, float]:
        """Flat numbers for receipts and `--json`."""
        return {
            **with_interval(self.top1, self.test_samples),
            "top5": self.top5,
            "rate": self.chosen.rate,
            "batch_norm": float(self.chosen.batch_norm),
            **{f"validation_{setting}": share for setting, share in self.validation.items()},
            "at_edge": float(self.at_edge),
            "train_samples": self.train_samples,
            "test_samples": self.test_samples,
            "classes": self.classes,
        }


def linear_sgd(
    train: Features, test: Features, recipe: LinearSgdRecipe, *, device: torch.device | None = None
) -> LinearSgdScores:
    """Choose a head on a stratified part of the training set, train it on all of it, score the test set.

    Raises:
        UserError: if the two sets share no labels, the training set is too small to split, or a feature is
            not finite.
    """
    device = device or torch.device("cpu")
    train_x, test_x = near(train.x, device), near(test.x, device)
    refuse_not_finite(train_x, test_x, device=device)
    names, train_y, test_y = shared_labels(train, test)
    whole = Rows(x=train_x, y=train_y, device=device)
    kept = torch.zeros(len(train_y), dtype=torch.bool)
    kept[split_validation(train_y, recipe.validation_fraction, recipe.seed)[0]] = True
    rates = sorted(set(recipe.rates))
    settings = [Setting(*each) for each in itertools.product(rates, sorted(set(recipe.batch_norm)))]
    heads = train_heads(replace(whole, kept=kept), len(names), settings, recipe)
    outside = shares_right(replace(whole, kept=~kept), heads)
    validation = {setting: top1 for setting, (top1, _) in zip(settings, outside, strict=True)}
    best = max(settings, key=lambda setting: validation[setting])  # of equals the one with the lowest rate
    at_edge = len(rates) > 1 and best.rate in (rates[0], rates[-1])
    if at_edge:
        logger.warning(
            "linear_sgd: the best rate %g is at the edge of those tried, %g to %g; try more of them",
            best.rate,
            rates[0],
            rates[-1],
        )
    [(top1, top5)] = shares_right(
        Rows(x=test_x, y=test_y, device=device), train_heads(whole, len(names), [best], recipe)
    )
    return LinearSgdScores(
        top1=top1,
        top5=top5,
        chosen=best,
        validation=validation,
        at_edge=at_edge,
        train_samples=len(train_y),
        test_samples=len(test_y),
        classes=len(names),
    )


def train_heads(
    rows: Rows, classes: int, settings: Sequence[Setting], recipe: LinearSgdRecipe
) -> list[nn.Sequential]:
    """A head for each setting, from zero; none is touched by what the others are.

    Weights and biases of the linear layers are decayed, BatchNorm's are not, as in VISSL.
    """
    width = rows.x.shape[1]
    heads = [_head(width, classes, setting.batch_norm).to(rows.device, rows.dtype) for setting in settings]
    peaks = [setting.rate * recipe.batch_size / 256 for setting in settings]
    optimizer = torch.optim.SGD(
        [
            {"params": list(layer.parameters()), "peak": peak, "weight_decay": decay}
            for head, peak in zip(heads, peaks, strict=True)
            for layer, decay in zip(reversed(head), (recipe.weight_decay, 0.0), strict=False)
        ],
        lr=0.0,  # set at each step
        momentum=recipe.momentum,
        nesterov=True,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    total = recipe.epochs * max(1, len(rows) // recipe.batch_size)
    batches = (
        batch for _ in range(recipe.epochs) for batch in in_batches(rows, recipe.batch_size, generator)
    )
    for step, (x, y) in enumerate(batches):
        drops = sum(step >= share * total for share in recipe.milestones)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * recipe.gamma**drops
        optimizer.zero_grad()
        # The gradient of a sum, for each head, is that of its own loss.
        loss = torch.stack([F.cross_entropy(head(x), y) for head in heads]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return [head.eval() for head in heads]


@torch.inference_mode()
def shares_right(rows: Rows, heads: Sequence[nn.Module]) -> list[tuple[float, float]]:
    """For each head the shares of rows whose class is the first, or one of the first five, that it says; 0 of
    one that has diverged.
    """
    right = [[0.0, 0.0] for _ in heads]
    for x, y in rows:
        for head, of_head in zip(heads, right, strict=True):
            logits = head(x)
            if logits.isfinite().all():
                for place, top in enumerate((1, 5)):
                    of_head[place] += accuracy(logits, y, top) * len(y)
    return [(round(first) / len(rows), round(five) / len(rows)) for first, five in right]


def _head(width: int, classes: int, batch_norm: bool) -> nn.Sequential:
    linear = nn.Linear(width, classes)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.BatchNorm1d(width), linear) if batch_norm else nn.Sequential(linear)
