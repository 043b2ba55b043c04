"""Classifiers on the same images: which is better, as far as the images tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.errors import UserError
from pipeline.transfer.predict import summarise
from pipeline.transfer.statistics import Paired, compare_paired, holm


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two of the classifiers.

    Attributes:
        p: of McNemar's exact test, corrected for the number of pairs (Holm).
    """

    first: str
    second: str
    paired: Paired
    p: float

    @property
    def better(self) -> str | None:
        """The better one, if both the interval and the corrected test say that there is one."""
        if not self.paired.decided or self.p >= 0.05:
            return None
        return self.second if self.paired.difference > 0 else self.first


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Classifiers on the same images.

    Attributes:
        scores: name → what `summarise` says.
        pairs: each with each.
    """

    scores: Mapping[str, Mapping[str, float]]
    pairs: list[Pair]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "classifiers": {name: dict(scores) for name, scores in self.scores.items()},
            "pairs": [asdict(pair) | {"better": pair.better} for pair in self.pairs],
        }


def compare_predictions(predictions: Mapping[str, pa.Table]) -> Comparison:
    """Compare what classifiers said of the same images, each with each.

    Args:
        predictions: name → what `predict` gave.

    Raises:
        UserError: if they are fewer than two, or not of the same images, or of none.
    """
    if len(predictions) < 2:
        raise UserError("there is 1 classifier to compare: name two at least")
    for name, table in predictions.items():
        if not len(table):
            raise UserError(f"{name} was tested on no image: there is nothing to compare")
    sorted_tables = {name: table.sort_by("key") for name, table in predictions.items()}
    reference, *others = sorted_tables
    for name in others:
        _refuse_other_images(reference, sorted_tables[reference], name, sorted_tables[name])
    right = {name: table["right_at"].to_numpy() == 0 for name, table in sorted_tables.items()}
    pairs = [(one, other, compare_paired(right[one], right[other])) for one, other in combinations(right, 2)]
    corrected = holm([paired.p for _, _, paired in pairs])
    return Comparison(
        scores={name: summarise(table) for name, table in predictions.items()},
        pairs=[
            Pair(first=one, second=other, paired=paired, p=p)
            for (one, other, paired), p in zip(pairs, corrected, strict=True)
        ],
    )


def _refuse_other_images(one: str, first: pa.Table, other: str, second: pa.Table) -> None:
    roots = [table.schema.metadata[b"dataset"].decode() for table in (first, second)]
    if roots[0] != roots[1]:
        raise UserError(
            f"{one} was tested on dataset {roots[0][:12]} and {other} on {roots[1][:12]}: only predictions "
            "for the same images can be compared"
        )
    if not np.array_equal(first["key"].to_numpy(), second["key"].to_numpy()):
        raise UserError(
            f"{one} was tested on {len(first)} images and {other} on {len(second)}, not the same ones: test "
            "both on the same view"
        )
