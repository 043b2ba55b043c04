"""So many images of each label, drawn by a seed: the same ones, however the dataset was cut into units.

An image's place in the draw is a keyed hash of its bytes; images of the same bytes stand in the order of
their keys. One with several labels stands in the draw of each, so that a label may end with more than were
asked for. Labels to ignore do not count.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ingest.dataset.keys import key_of, keys_of
from ingest.dataset.view import PackedKeeps
from ingest.dataset.vocabulary import UnitLabels

# A label's code, the image's place in the draw, and its key.
ENTRY = np.dtype([("label", "<i4"), ("place", "<u8"), ("key", "<u8")])


@dataclass(frozen=True, kw_only=True)
class PerLabel:
    """How many of each label, and the seed of the draw."""

    count: int
    seed: int = 0


def entries_of(
    wanted: PerLabel, unit: int, rows: pa.Table, labels: UnitLabels, stays: NDArray[np.bool_]
) -> NDArray[np.void]:
    """What the draws of labels have from a unit: (n,) `ENTRY`.

    Args:
        rows: the unit's samples, with `slot` and `sha256`.
        labels: theirs.
        stays: which of them can be drawn, (rows,).
    """
    radix = 1 + max(labels.codes.max(initial=0), labels.ignored.max(initial=0))
    right, ignored = (
        np.repeat(np.arange(len(labels)), np.diff(starts)) * radix + codes
        for codes, starts in ((labels.codes, labels.starts), (labels.ignored, labels.ignored_starts))
    )
    row, label = np.divmod(np.setdiff1d(right, ignored), radix)
    row, label = row[stays[row]], label[stays[row]]
    drawn, which = np.unique(row, return_inverse=True)
    seed = wanted.seed.to_bytes(16, "little")
    places = np.array(
        [
            int.from_bytes(blake2b(digest, digest_size=8, key=seed).digest(), "little")
            for digest in rows["sha256"].take(pa.array(drawn)).to_pylist()
        ],
        np.uint64,
    )
    found = np.empty(len(row), ENTRY)
    found["label"], found["place"] = label, places[which]
    found["key"] = keys_of(unit, rows["slot"].to_numpy()[row])
    return first_of_each(found, wanted.count)


def first_of_each(entries: NDArray[np.void], count: int) -> NDArray[np.void]:
    """The first so many of each label, by label and place; all of a label that has fewer."""
    entries = entries[np.lexsort((entries["key"], entries["place"], entries["label"]))]
    _, first, number = np.unique(entries["label"], return_index=True, return_inverse=True)
    return entries[np.arange(len(entries)) - first[number] < count]


def bits_of(keys: NDArray[np.uint64], keeps: Mapping[int, NDArray[np.bool_]]) -> PackedKeeps:
    """Of the units in `keeps`, only the slots that have these keys, which are ascending."""
    found = PackedKeeps()
    for unit, before in keeps.items():
        low, high = np.searchsorted(keys, np.array([key_of(unit, 0), key_of(unit + 1, 0)], np.uint64))
        bits = np.zeros(len(before), bool)
        bits[keys[low:high] - np.uint64(key_of(unit, 0))] = True
        found.add(unit, bits)
    return found


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a draw found.

    Attributes:
        labels: that have an image at all.
        short: label → its images, of those that have fewer than were asked for: all of them are taken.
        shared: how often an image was drawn for one more label.
    """

    labels: int
    short: Mapping[str, int]
    shared: int


def sum_up(entries: NDArray[np.void], count: int, names: pa.StringArray) -> Drawn:
    """Of the first so many of each label."""
    labels, images = np.unique(entries["label"], return_counts=True)
    short = images < count
    said: Iterable[str] = names.take(pa.array(labels[short])).to_pylist()
    return Drawn(
        labels=len(labels),
        short=dict(zip(said, images[short].tolist(), strict=True)),
        shared=len(entries) - len(np.unique(entries["key"])),
    )
