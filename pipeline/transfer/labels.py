"""The labels of a dataset's samples for evaluations: as a rule one per image, its class.

Where images have several labels, or labels to ignore, each distinct set of both is a class, so that what
holds a class for each image can hold them. Its name is that of no label.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from cluster.errors import UserError
from cluster.wording import visible
from ingest.dataset.keys import key_name
from ingest.dataset.open import Dataset

# Begins the name of a set. No label does: it is a control character, which no text has.
_SET = "\x1f"


def classes_of(
    dataset: Dataset, positions: NDArray[np.int64], *, several_labels: bool = False
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Sorted names of classes, and which of them each sample has, (n,).

    Args:
        positions: of the samples on the dataset's global axis, ascending.
        several_labels: whether they may have several labels, none, or labels to ignore. If some have several,
            or some to ignore, the class of each that has not just one is a set.

    Raises:
        UserError: a sample has no label, or several, and is not to.
    """
    units, rows = _places(dataset, positions)
    labels = {unit: dataset.unit_labels(unit) for unit in np.unique(units).tolist()} if several_labels else {}
    if not any(np.any(np.diff(each.starts) > 1) or len(each.ignored) for each in labels.values()):
        codes, y = np.unique(only_labels(dataset, positions), return_inverse=True)
        return tuple(dataset.vocabulary.names[code] for code in codes), y.astype(np.int64)
    names = dataset.vocabulary.names
    sets = [
        _set_name(
            [names[code] for code in labels[unit].of(row)],
            [names[code] for code in labels[unit].ignored_of(row)],
        )
        for unit, row in zip(units.tolist(), rows.tolist(), strict=True)
    ]
    classes = sorted(set(sets))
    number = {name: index for index, name in enumerate(classes)}
    return tuple(classes), np.array([number[name] for name in sets], np.int64)


def is_set(name: str) -> bool:
    """Whether a class is a set of labels."""
    return name.startswith(_SET)


def labels_in(name: str) -> tuple[list[str], list[str]]:
    """The labels of images of a class, and those to ignore."""
    if not is_set(name):
        return [name], []
    right, ignored = json.loads(name.removeprefix(_SET))
    return right, ignored


def _set_name(labels: list[str], ignored: list[str]) -> str:
    right = sorted(set(labels) - set(ignored))
    if len(right) == 1 and not ignored:
        return right[0]
    return _SET + json.dumps([right, sorted(set(ignored))])


def only_labels(dataset: Dataset, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The code of each sample's label, (n,), in the dataset's vocabulary; see `Dataset.unit_labels`.

    Args:
        positions: of the samples on the dataset's global axis, ascending.

    Raises:
        UserError: a sample has no label, or several.
    """
    units, places = _places(dataset, positions)
    codes = np.empty(len(positions), np.int64)
    for unit in np.unique(units).tolist():
        labels = dataset.unit_labels(unit)
        here = units == unit
        rows = places[here]
        counts = np.diff(labels.starts)[rows]
        if np.any(counts != 1):
            raise _not_one(dataset, unit, int(rows[np.argmax(counts != 1)]))
        codes[here] = labels.codes[labels.starts[rows]]
    return codes


def _places(dataset: Dataset, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The unit of each sample, by its place, and its row there."""
    ends = np.cumsum(dataset.counts)
    units = np.searchsorted(ends, positions, side="right")
    return units, positions - (ends - dataset.counts)[units]


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
