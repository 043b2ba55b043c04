"""The labels of a dataset's samples for evaluations that know one per image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError
from cluster.wording import visible
from ingest.dataset.keys import key_name
from ingest.dataset.open import Dataset


def only_labels(dataset: Dataset, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The code of each sample's label, (n,), in the dataset's vocabulary; see `Dataset.unit_labels`.

    Args:
        positions: of the samples on the dataset's global axis, ascending.

    Raises:
        UserError: a sample has no label, or several.
    """
    ends = np.cumsum(dataset.counts)
    units = np.searchsorted(ends, positions, side="right")
    codes = np.empty(len(positions), np.int64)
    for unit in np.unique(units).tolist():
        labels = dataset.unit_labels(unit)
        here = units == unit
        rows = positions[here] - (ends[unit] - dataset.counts[unit])
        counts = np.diff(labels.starts)[rows]
        if np.any(counts != 1):
            raise _not_one(dataset, unit, int(rows[np.argmax(counts != 1)]))
        codes[here] = labels.codes[labels.starts[rows]]
    return codes


def _not_one(dataset: Dataset, unit: int, row: int) -> UserError:
    sample = f"sample {key_name(int(dataset.unit_keys(unit)[row]))} of {dataset.path}"
    view = f"`ingest view {dataset.path} --name single --where 'label_count = 1'`"
    codes = dataset.unit_labels(unit).of(row)
    if not len(codes):
        return UserError(
            f"{sample} has no label, and this evaluation needs one of each: crawl with --labels-from or "
            f"--labels, or leave such samples out with {view}"
        )
    names = ", ".join(visible(dataset.vocabulary.names[code]) for code in codes[:5])
    return UserError(
        f"{sample} has {len(codes)} labels ({names}), and this evaluation knows one per image: leave such "
        f"samples out with {view}"
    )
