"""Retrieval: for each query the images of a database by cosine similarity, those of its label being right.

Copy detection is retrieval where all copies of one image have a label of their own. Average precision is the
area under the trapezoids of the precision-recall curve, as the evaluation of INRIA Copydays has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.recipe.transfer import RetrieveRecipe
from pipeline.transfer.features import Features
from pipeline.transfer.scores import shared_labels
from pipeline.transfer.statistics import Interval, bootstrap

_QUERIES_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class RetrieveScores:
    """The mean of queries' average precisions, and its interval over queries.

    `left_out` are queries of whose label the database has no image.
    """

    mean: float
    interval: Interval
    queries: int
    left_out: int
    database: int

    def metrics(self) -> dict[str, float]:
        """Flat numbers for receipts and `--json`."""
        return {
            "map": self.mean,
            "map_low": self.interval.low,
            "map_high": self.interval.high,
            "queries": self.queries,
            "queries_left_out": self.left_out,
            "database": self.database,
        }


def retrieve(
    train: Features, test: Features, recipe: RetrieveRecipe, *, device: torch.device | None = None
) -> RetrieveScores:
    """Look for the images of `test`, the queries, among those of `train`, the database.

    Raises:
        UserError: if the two sets share no labels.
    """
    _, labels, wanted = shared_labels(train, test)
    device = device or torch.device("cpu")
    database = F.normalize(train.x.float().to(device), dim=1)
    found: list[float] = []
    for start in range(0, len(wanted), _QUERIES_AT_ONCE):
        queries = F.normalize(test.x[start : start + _QUERIES_AT_ONCE].float().to(device), dim=1)
        for similarity, label in zip((queries @ database.T).cpu(), wanted[start:], strict=False):
            right = labels == label
            if right.any():
                found.append(trapezoids(ranks_of(similarity, right)))
    precisions = np.array(found)
    return RetrieveScores(
        mean=float(precisions.mean()),
        interval=bootstrap(
            lambda counts: counts @ precisions / len(precisions),
            len(precisions),
            draws=recipe.draws,
            seed=recipe.seed,
        ),
        queries=len(precisions),
        left_out=len(wanted) - len(precisions),
        database=len(labels),
    )


def ranks_of(similarity: Tensor, right: Tensor) -> NDArray[np.int64]:
    """How many images come before each right one, ascending; of equally similar ones the wrong come first.

    Args:
        similarity: (n,). right: (n,) bool.
    """
    wrong = np.sort(-similarity[~right].numpy())
    hits = np.sort(-similarity[right].numpy())
    return np.searchsorted(wrong, hits, side="right") + np.arange(len(hits))


def trapezoids(ranks: NDArray[np.int64]) -> float:
    """Average precision, where right images come after `ranks` others, ascending and all of them."""
    hits = np.arange(len(ranks))
    before = np.where(ranks > 0, hits / np.maximum(ranks, 1), 1.0)
    return float(((before + (hits + 1) / (ranks + 1)) / 2).mean())
