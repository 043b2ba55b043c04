"""The losses of Barlow Twins, BYOL and SimSiam in plain NumPy, written from the papers, term by term."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def barlow_twins_of_the_paper(
    z_a: Array, z_b: Array, weight: float, epsilon: float = 0
) -> tuple[float, float, float]:
    """Zbontar et al., 2021: equation 2 for every pair of components, then both sums of equation 1.

    Args:
        epsilon: what the authors' code adds to each variance, and the equation does not.

    Returns:
        The loss, the invariance term, and the redundancy reduction term without its weight.
    """
    z_a, z_b = z_a - z_a.mean(0), z_b - z_b.mean(0)  # "assumed to be mean-centered along the batch dimension"
    samples, dim = z_a.shape
    invariance = redundancy = 0.0
    for i in range(dim):
        for j in range(dim):
            length_a = np.sqrt(np.sum(z_a[:, i] ** 2) + samples * epsilon)
            length_b = np.sqrt(np.sum(z_b[:, j] ** 2) + samples * epsilon)
            correlation = np.sum(z_a[:, i] * z_b[:, j]) / (length_a * length_b)
            if i == j:
                invariance += (1 - correlation) ** 2
            else:
                redundancy += correlation**2
    return float(invariance + weight * redundancy), float(invariance), float(redundancy)


def byol_of_the_paper(p_a: Array, p_b: Array, t_a: Array, t_b: Array) -> float:
    """Grill et al., 2020: equation 2 for both orders of the views, averaged over the samples."""
    losses = []
    for predictions, targets in ((p_a, t_b), (p_b, t_a)):
        for p, t in zip(predictions, targets, strict=True):
            losses.append(np.sum((p / np.linalg.norm(p) - t / np.linalg.norm(t)) ** 2))
    return float(np.sum(losses) / len(p_a))


def simsiam_of_the_paper(p_a: Array, p_b: Array, z_a: Array, z_b: Array) -> float:
    """Chen & He, 2021: equations 1 and 2, averaged over the samples."""

    def distance(p: Array, z: Array) -> float:
        return -float(p / np.linalg.norm(p) @ (z / np.linalg.norm(z)))

    rows = zip(p_a, p_b, z_a, z_b, strict=True)
    return float(np.mean([distance(pa, zb) / 2 + distance(pb, za) / 2 for pa, pb, za, zb in rows]))
