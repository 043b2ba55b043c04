"""Average precision, of which there are three: they differ by points, and a table may hold only one of them.

Images are ranked by a class's score; recall and precision are taken after each distinct score, so that the
order of equal ones does not matter.

    interpolated   area under the curve, where the precision at a recall is the best at that or a higher one:
                   what VISSL calls average precision
    eleven_points  mean of that precision at the recalls 0, 0.1 … 1: PASCAL VOC's, until 2009
                   (https://doi.org/10.1007/s11263-009-0275-4)
    scikit_learn   area under the steps of the curve as it is: `sklearn.metrics.average_precision_score`
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.recipe.transfer import AveragePrecision


def average_precisions(
    scores: NDArray[np.float64],
    right: NDArray[np.bool_],
    counts: NDArray[np.int64],
    *,
    definition: AveragePrecision,
) -> NDArray[np.float64]:
    """Average precision of one class in several samples of the same images.

    Args:
        scores: (n,), the higher the likelier. right: (n,), which images have the class.
        counts: (d, n), how often each sample has each image: all ones for the images themselves.

    Returns:
        (d,), from 0 to 1; nan for a sample without an image of the class.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_equals = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    counts = counts[:, order]
    found = np.cumsum(counts * right[order], axis=1)[:, last_of_equals]
    said = np.cumsum(counts, axis=1)[:, last_of_equals]
    positives = found[:, -1:]
    precision = found / np.maximum(said, 1)
    if definition != "scikit_learn":
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    if definition == "eleven_points":
        # In whole numbers: 3 of 10 are a recall of 0.3, whatever 0.1 * 3 is.
        first = np.stack([(10 * found < tenths * positives).sum(axis=1) for tenths in range(11)], axis=1)
        found_out = np.take_along_axis(precision, first, axis=1).mean(axis=1)
    else:
        steps = np.diff(found, axis=1, prepend=0)
        found_out = (steps * precision).sum(axis=1) / np.maximum(positives[:, 0], 1)
    return np.where(positives[:, 0] > 0, found_out, np.nan)


def of_classes(
    scores: NDArray[np.float64],
    target: NDArray[np.int8],
    counts: NDArray[np.int64],
    *,
    definition: AveragePrecision,
) -> NDArray[np.float64]:
    """Average precision of each class in each sample, (d, classes), without the images to ignore for it.

    Args:
        scores: (n, classes).
        target: (n, classes), 1 where an image has the class, -1 where the class is to be ignored.
        counts: (d, n), as above.
    """
    each = []
    for of_class, said in zip(scores.T, target.T, strict=True):
        counted = said >= 0
        right = said[counted] > 0
        each.append(average_precisions(of_class[counted], right, counts[:, counted], definition=definition))
    return np.stack(each, axis=1)


def mean_of_classes(each: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the classes that a sample has, (d, classes) → (d,)."""
    there = ~np.isnan(each)
    mean: NDArray[np.float64] = np.nansum(each, axis=1) / np.maximum(there.sum(1), 1)
    return mean
