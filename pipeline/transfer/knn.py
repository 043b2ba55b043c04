"""Weighted k-nearest-neighbour classification of frozen features, exact and in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.errors import UserError
from pipeline.recipe.transfer import KnnRecipe
from pipeline.transfer.features import Features
from pipeline.transfer.scores import accuracy, shared_labels, with_interval


@dataclass(frozen=True, kw_only=True)
class KnnScores:
    """Accuracies as fractions, by k, in the order the recipe gives; the first k is the headline."""

    top1: dict[int, float]
    top5: dict[int, float]
    train_samples: int
    test_samples: int
    classes: int

    def metrics(self) -> dict[str, float]:
        """Flat numbers for receipts and `--json`: `top1`, its interval and `top5` belong to the first k."""
        headline = next(iter(self.top1))
        return {
            **with_interval(self.top1[headline], self.test_samples),
            "top5": self.top5[headline],
            "k": headline,
            **{f"top1_k{k}": value for k, value in self.top1.items()},
            **{f"top5_k{k}": value for k, value in self.top5.items()},
            "train_samples": self.train_samples,
            "test_samples": self.test_samples,
            "classes": self.classes,
        }


def knn(
    train: Features, test: Features, recipe: KnnRecipe, *, device: torch.device | None = None
) -> KnnScores:
    """Score test features against training features; labels are matched by name.

    Raises:
        UserError: if a k exceeds the number of training samples, or the two sets share no labels.
    """
    names, train_y, test_y = shared_labels(train, test)
    if max(recipe.k) > len(train_y):
        raise UserError(
            f"kNN with k={max(recipe.k)} needs as many training samples, there are {len(train_y)}; lower k"
        )
    device = device or torch.device("cpu")
    votes = knn_votes(
        train.x.to(device),
        train_y.to(device),
        test.x.to(device),
        classes=len(names),
        k=recipe.k,
        temperature=recipe.temperature,
    )
    target = test_y.to(device)
    return KnnScores(
        top1={k: accuracy(scores, target, 1) for k, scores in votes.items()},
        top5={k: accuracy(scores, target, 5) for k, scores in votes.items()},
        train_samples=len(train_y),
        test_samples=len(test_y),
        classes=len(names),
    )


def knn_votes(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, *, classes: int, k: tuple[int, ...], temperature: float
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
    train_x = F.normalize(train_x.float(), dim=1)
    test_x = F.normalize(test_x.float(), dim=1)
    votes: dict[int, list[Tensor]] = {size: [] for size in k}
    for start in range(0, len(test_x), _QUERY_ROWS):
        queries = test_x[start : start + _QUERY_ROWS]
        similarity, index = nearest(train_x, queries, k=max(k))
        # In float64: a temperature may be smaller than float32's smallest number.
        behind = (similarity - similarity[:, :1]).double()
        weight = torch.exp(behind / temperature).float()
        label = train_y[index]
        for size in k:
            tally = torch.zeros(len(queries), classes, device=queries.device)
            votes[size].append(tally.scatter_add_(1, label[:, :size], weight[:, :size]))
    return {size: torch.cat(parts) for size, parts in votes.items()}


def nearest(bank: Tensor, queries: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k largest inner products with rows of `bank`, exact, with bounded memory.

    Args:
        bank: (n, d), n >= k. queries: (m, d).

    Returns:
        (m, k) products, descending, and the (m, k) rows of `bank` they belong to.
    """
    best, index = (
        queries.new_empty(len(queries), 0),
        torch.empty(len(queries), 0, dtype=torch.long, device=queries.device),
    )
    for start in range(0, len(bank), _BANK_ROWS):
        rows = bank[start : start + _BANK_ROWS]
        products = queries @ rows.T
        value, column = products.topk(min(k, len(rows)), dim=1)
        best, index = torch.cat([best, value], dim=1), torch.cat([index, column + start], dim=1)
        best, position = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, position)
    return best, index


# Together they bound the similarity matrix to 256 MiB in fp32.
_QUERY_ROWS = 1024
_BANK_ROWS = 65_536
