"""What every score shares: labels of both datasets, accuracy, its error."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.errors import UserError
from cluster.wording import visible
from pipeline.transfer.labels import is_set
from pipeline.transfer.statistics import wilson

if TYPE_CHECKING:
    from pipeline.transfer.features import Features


logger = logging.getLogger(__name__)

_NAMED = 5


class Scores(Protocol):
    """What an evaluation found out."""

    def metrics(self) -> dict[str, float]:
        """Flat numbers for receipts and `--json`: the evaluation's metric and the ends of its interval. The
        report shows `top1` (a fraction), `top1_low` and `top1_high`, and, where there is one, `top5`.
        """


def shared_labels(train: Features, test: Features) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Number the labels of two sets alike.

    Returns:
        Names of all classes, and the int64 class of each training and test sample.

    Raises:
        UserError: if a set is empty, or there are fewer than two classes in training.
    """
    if len(train.y) == 0 or len(test.y) == 0:
        raise UserError("an evaluation needs training and test samples; one of the two datasets is empty")
    if len(train.classes) < 2:
        raise UserError(
            f"an evaluation needs at least two labels, the training set has only {train.classes}; "
            "`ingest crawl-shards --help` says how labels are seen from paths, or read from files"
        )
    if not set(train.classes) & set(test.classes):
        raise UserError(
            "the training and the test set share no label; were both crawled with labels of one kind, as "
            "--labels-from or --labels say?"
        )
    if any(is_set(name) for part in (train, test) for name in part.classes):
        raise UserError(
            "some images have several labels, or labels to ignore, and this evaluation knows one per image: "
            "score these features by svm, or extract others of a view made with --where 'label_count = 1'"
        )
    _warn_of_unknown(train, test)
    names = tuple(sorted({*train.classes, *test.classes}))
    number = {name: index for index, name in enumerate(names)}
    to_shared = [torch.tensor([number[name] for name in part.classes]) for part in (train, test)]
    return names, to_shared[0][train.y], to_shared[1][test.y]


def windows_of(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Which sample each row is a window of, (n,), numbered in the order of their first rows; and these rows,
    (samples,).

    Args:
        keys: (n,) int64, of samples.
    """
    _, first, sample = np.unique(keys.numpy(), return_index=True, return_inverse=True)
    order = np.argsort(first)
    return torch.from_numpy(np.argsort(order)[sample]), torch.from_numpy(first[order])


def mean_of_samples(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """What is said of a sample, where several windows of it were looked at: the mean.

    Args:
        rows: (n, c), of windows. keys: (n,) of the samples that these are of.

    Returns:
        (samples, c), and the first row of each sample, (samples,) int64.
    """
    sample, first = windows_of(keys)
    total = rows.new_zeros(len(first), rows.shape[1]).index_add_(0, sample, rows)
    return total / sample.bincount()[:, None], first


def _warn_of_unknown(train: Features, test: Features) -> None:
    unknown = [index for index, name in enumerate(test.classes) if name not in train.classes]
    if unknown:
        samples = int(torch.isin(test.y, torch.tensor(unknown)).sum())
        names = ", ".join(visible(test.classes[index]) for index in unknown[:_NAMED])
        logger.warning(
            "%d of %d test images have one of %d labels that no training image has (%s%s): each counts as an "
            "error; leave them out with a view of the test set",
            samples,
            len(test.y),
            len(unknown),
            names,
            ", …" if len(unknown) > _NAMED else "",
        )


def standing(train_y: Tensor, test_y: Tensor, classes: int) -> dict[str, float]:
    """What an accuracy stands on: images on either side, and classes that only one side has, whose test
    images count as errors.

    Args:
        train_y, test_y: int64 classes, numbered alike.
        classes: of both sides together.
    """
    learnt, asked = (torch.bincount(y, minlength=classes) for y in (train_y, test_y))
    return {
        "train_samples": len(train_y),
        "test_samples": len(test_y),
        "classes": classes,
        "classes_without_training": int((learnt == 0).sum()),
        "classes_without_test": int((asked == 0).sum()),
        "test_samples_without_training": int(asked[learnt == 0].sum()),
    }


def top5_among(classes: int, top5: float, name: str = "top5") -> dict[str, float]:
    """The share of samples whose class is among five guesses; nothing where five are all that there are."""
    return {name: top5} if classes > 5 else {}


def with_interval(top1: float, samples: int) -> dict[str, float]:
    """`top1` and the ends of its 95 % interval over so many independent images."""
    interval = wilson(round(top1 * samples), samples)
    return {"top1": top1, "top1_low": interval.low, "top1_high": interval.high}


def accuracy(votes: Tensor, target: Tensor, top: int) -> float:
    """Share of samples whose class is among the `top` of its votes or logits.

    Args:
        votes: (n, classes). target: (n,) int64 classes.
    """
    guesses = votes.topk(min(top, votes.shape[1]), dim=1).indices
    return float((guesses == target[:, None]).any(dim=1).double().mean())
