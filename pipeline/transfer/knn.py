"""Weighted k-nearest-neighbour classification of frozen features, exact and in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import UserError
from pipeline.recipe.transfer import KnnRecipe
from pipeline.transfer.features import Features
from pipeline.transfer.rows import chunk_rows, floats, near
from pipeline.transfer.scores import accuracy, shared_labels, standing, top5_among, with_interval


@dataclass(frozen=True, kw_only=True)
class KnnScores:
    """Accuracies as fractions, by k, in the order the recipe gives; the first k is the headline.

    Attributes:
        tied: the share of test samples of which, at the first k, two classes have equally many votes.
        standing: see `pipeline.transfer.scores.standing`.
    """

    top1: dict[int, float]
    top5: dict[int, float]
    tied: float
    test_samples: int
    classes: int
    standing: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """Flat numbers for receipts and `--json`: `top1`, its interval and `top5` belong to the first k."""
        headline = next(iter(self.top1))
        return {
            **with_interval(self.top1[headline], self.test_samples),
            **top5_among(self.classes, self.top5[headline]),
            "k": headline,
            **{f"top1_k{k}": value for k, value in self.top1.items()},
            **{
                name: value
                for k, top5 in self.top5.items()
                for name, value in top5_among(self.classes, top5, f"top5_k{k}").items()
            },
            "tied": self.tied,
            **self.standing,
        }


def knn(
    train: Features, test: Features, recipe: KnnRecipe, *, device: torch.device | None = None
) -> KnnScores:
    """Score test features against training features; labels are matched by name.

    Raises:
        UserError: if a k exceeds the number of training samples, or the two sets share no labels.
    """
    names, train_y, test_y = shared_labels(train, test)
    refuse_recipe(recipe, len(train_y))
    device = device or torch.device("cpu")
    votes = knn_votes(
        near(train.x, device),
        train_y,
        near(test.x, device),
        classes=len(names),
        k=recipe.k,
        temperature=recipe.temperature,
        device=device,
    )
    target = test_y.to(device)
    return KnnScores(
        top1={k: accuracy(scores, target, 1) for k, scores in votes.items()},
        top5={k: accuracy(scores, target, 5) for k, scores in votes.items()},
        tied=_tied(votes[recipe.k[0]]),
        test_samples=len(test_y),
        classes=len(names),
        standing=standing(train_y, test_y, len(names)),
    )


def refuse_recipe(recipe: KnnRecipe, samples: int) -> None:
    """Refuse to ask for more neighbours than there are training samples.

    Raises:
        UserError: saying how many there are.
    """
    if (k := max(recipe.k)) > samples:
        raise UserError(
            f"kNN with k={k} needs as many training samples, and there are {samples}: lower k, such as k=[1]"
        )


def _tied(votes: Tensor) -> float:
    """The share of (m, classes) votes whose largest two are equal."""
    first, second = votes.topk(2, dim=1).values.T
    return float((first == second).double().mean())


def knn_votes(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    classes: int,
    k: tuple[int, ...],
    temperature: float,
    device: torch.device | None = None,
) -> dict[int, Tensor]:
    """Summed votes per class, weighted by exp((cosine similarity - that of the nearest) / temperature).

    Section 3.4 of Wu et al., 2018 (https://arxiv.org/abs/1805.01978), but for a factor that all votes of a
    query have in common: the nearest neighbour's is 1, at any temperature.

    Args:
        train_x, train_y: (n, d) features and (n,) int64 classes in [0, classes).
        test_x: (m, d) features.
        k: neighbourhood sizes, each at most n.

    Returns:
        For each k, (m, classes) votes.
    """
    similarity, index = nearest(train_x, test_x, k=max(k), device=device)
    # In float64: a temperature may be smaller than float32's smallest number.
    weight = torch.exp((similarity - similarity[:, :1]).double() / temperature).float()
    label = train_y.to(index.device)[index]
    nothing = torch.zeros(len(test_x), classes, device=index.device)
    return {size: nothing.scatter_add(1, label[:, :size], weight[:, :size]) for size in k}


def nearest(
    bank: Tensor, queries: Tensor, *, k: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` of the largest cosine similarity, exact, with bounded memory.

    The bank is read once, a chunk at a time, and every query shown to the chunk.

    Args:
        bank: (n, d), n >= k. queries: (m, d). Either may be a mapped file.
        device: where to compute; None for where the bank is.

    Returns:
        (m, k) similarities, descending, and the (m, k) rows of `bank` they belong to.
    """
    device = device or bank.device
    best = torch.full((len(queries), k), -torch.inf, device=device)
    index = torch.zeros(len(queries), k, dtype=torch.long, device=device)
    step = min(_BANK_ROWS, chunk_rows(bank.shape[1], _BANK_BYTES))
    for start in range(0, len(bank), step):
        rows = F.normalize(floats(bank[start : start + step], device), dim=1)
        for first in range(0, len(queries), _QUERY_ROWS):
            asked = slice(first, first + _QUERY_ROWS)
            products = F.normalize(floats(queries[asked], device), dim=1) @ rows.T
            value, column = products.topk(min(k, len(rows)), dim=1)
            values, places = torch.cat([best[asked], value], dim=1), [index[asked], column + start]
            best[asked], position = values.topk(k, dim=1)
            index[asked] = torch.cat(places, dim=1).gather(1, position)
    return best, index


# Together they bound the similarity matrix to 256 MiB in fp32.
_QUERY_ROWS = 1024
_BANK_ROWS = 65_536
_BANK_BYTES = 512 << 20  # of a chunk: the queries are normalised anew for each
