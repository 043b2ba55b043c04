"""SwAV's equations in plain NumPy, written from the paper: Caron et al., 2020."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def sinkhorn_of_the_paper(scores: NDArray[Any], epsilon: float, iterations: int) -> NDArray[Any]:
    """Equation 5: Diag(u) exp(C^T Z / epsilon) Diag(v), prototypes by samples, marginals 1/K and 1/B."""
    kernel = np.exp(scores.T / epsilon)
    prototypes, samples = kernel.shape
    u, v = np.ones(prototypes), np.ones(samples)
    for _ in range(iterations):
        u = 1 / prototypes / (kernel @ v)
        v = 1 / samples / (kernel.T @ u)
    plan: NDArray[Any] = np.diag(u) @ kernel @ np.diag(v)
    return samples * plan.T


def loss_of_the_paper(scores: NDArray[Any], assignments: NDArray[Any], temperature: float) -> float:
    """Equations 1, 2 and 6, term by term."""
    views, samples, _ = scores.shape
    terms = []
    for i in range(len(assignments)):
        for v in range(views):
            for n in range(samples):
                if v != i:
                    power = np.exp(scores[v, n] / temperature)
                    terms.append(-np.sum(assignments[i, n] * np.log(power / power.sum())))
    return float(np.mean(terms))


def random_cosines(seed: int, *shape: int, dim: int = 8) -> NDArray[Any]:
    random = np.random.default_rng(seed)
    rows = random.standard_normal((*shape[:-1], dim))
    columns = random.standard_normal((shape[-1], dim))
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    columns /= np.linalg.norm(columns, axis=-1, keepdims=True)
    cosines: NDArray[Any] = rows @ columns.T
    return cosines
