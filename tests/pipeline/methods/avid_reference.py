"""AVID's and CMA's losses and positive sets, from the paper's equations, in plain NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def nce(query: Array, positives: Array, negatives: Array, *, temperature: float, z: float) -> float:
    """Of one query: the mean over positives of -ln P(data), and the sum over negatives of -ln P(noise)."""
    noise = len(negatives) * z
    data = np.array([np.exp(query @ p / temperature) for p in positives])
    others = np.array([np.exp(query @ n / temperature) for n in negatives])
    return float(-np.log(data / (data + noise)).mean() - np.log(noise / (others + noise)).sum())


def softmax(query: Array, positives: Array, negatives: Array, *, temperature: float, z: float) -> float:
    """Of one query: the mean over positives of -ln of its share among itself and the negatives."""
    others = sum(np.exp(query @ n / temperature) for n in negatives)
    data = np.array([np.exp(query @ p / temperature) for p in positives])
    return float(-np.log(data / (data + others)).mean())


def agreement(bank: Array, how: str) -> Array:
    """(N, 2, dim) → (N, N), with what is never a positive at minus infinity."""
    video, audio = (bank[:, m] @ bank[:, m].T for m in (0, 1))
    found = {
        "consensus": np.minimum(video, audio),
        "union": np.maximum(video, audio),
        "video": video,
        "audio": audio,
    }[how].copy()
    np.fill_diagonal(found, -np.inf)
    return found


def positive_sets(bank: Array, how: str, count: int) -> NDArray[np.int64]:
    """(N, count): those that agree most, the smaller row first where two agree as much."""
    found = agreement(bank, how).astype(np.float32)
    return np.argsort(-found, axis=1, kind="stable")[:, :count]
