"""SwAV's assignments and loss equal the paper's equations, and stay stable in float32."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from swav_reference import loss_of_the_paper, random_cosines, sinkhorn_of_the_paper
from torch import Tensor

from pipeline.methods.swav import sinkhorn, swav_loss


@given(
    samples=st.integers(1, 40),
    prototypes=st.integers(1, 60),
    epsilon=st.sampled_from([0.03, 0.05, 0.2, 1.0]),
    iterations=st.integers(1, 10),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=60)
def test_T5_sinkhorn_equals_the_paper(
    samples: int, prototypes: int, epsilon: float, iterations: int, seed: int
) -> None:
    scores = random_cosines(seed, samples, prototypes)
    found = sinkhorn(torch.from_numpy(scores.copy()), epsilon=epsilon, iterations=iterations)
    expected = sinkhorn_of_the_paper(scores, epsilon, iterations)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


@given(
    assigned=st.integers(1, 2),
    others=st.integers(1, 4),
    samples=st.integers(1, 6),
    prototypes=st.integers(2, 9),
    seed=st.integers(0, 10_000),
)
@settings(deadline=None, max_examples=40)
def test_T5_loss_equals_the_paper(
    assigned: int, others: int, samples: int, prototypes: int, seed: int
) -> None:
    scores = random_cosines(seed, assigned + others, samples, prototypes)
    assignments = np.stack([sinkhorn_of_the_paper(view, 0.05, 3) for view in scores[:assigned]])
    found = swav_loss(torch.from_numpy(scores), torch.from_numpy(assignments), temperature=0.1)
    assert float(found) == pytest.approx(loss_of_the_paper(scores, assignments, 0.1), rel=1e-12)


@given(
    samples=st.integers(1, 64),
    prototypes=st.integers(1, 96),
    epsilon=st.floats(0.005, 1.0),
    iterations=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
@example(samples=1, prototypes=96, epsilon=0.05, iterations=40, seed=0)
@settings(deadline=None, max_examples=60)
def test_sinkhorn_marginals_in_float32(
    samples: int, prototypes: int, epsilon: float, iterations: int, seed: int
) -> None:
    """Every sample has mass 1 at once; the prototypes' masses near B / K with every iteration."""
    scores = torch.from_numpy(random_cosines(seed, samples, prototypes, dim=2)).float()
    few = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    more = sinkhorn(scores, epsilon=epsilon, iterations=iterations + 10)
    assert bool((few >= 0).all()) and bool(few.isfinite().all())
    torch.testing.assert_close(few.sum(1), torch.ones(samples), rtol=0, atol=1e-5)
    share = samples / prototypes

    def worst(assignments: Tensor) -> float:
        return float((assignments.sum(0) / share - 1).abs().max())

    assert worst(more) <= worst(few) + 1e-3


def test_sinkhorn_reaches_equal_shares() -> None:
    scores = torch.from_numpy(random_cosines(0, 96, 24))
    assignments = sinkhorn(scores, epsilon=0.1, iterations=200)
    torch.testing.assert_close(
        assignments.sum(0), torch.full((24,), 96 / 24, dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kind", ["random", "extreme", "collapsed"])
def test_sinkhorn_is_stable_with_16k_prototypes_in_float32(kind: str) -> None:
    """SEER's setting, with a batch far smaller than the number of prototypes."""
    samples, prototypes = 256, 16_000
    if kind == "random":
        scores = torch.from_numpy(random_cosines(1, samples, prototypes, dim=256))
    elif kind == "extreme":
        # Cosines of -1 and 1 only: a spread of e^67 at epsilon 0.03, and prototypes that nobody likes.
        random = np.random.default_rng(1)
        scores = torch.from_numpy(np.where(random.random((samples, prototypes)) < 1e-3, 1.0, -1.0))
    else:
        scores = torch.full((samples, prototypes), 0.3, dtype=torch.float64)
    found = sinkhorn(scores.float(), epsilon=0.03, iterations=10)
    expected = sinkhorn(scores, epsilon=0.03, iterations=10)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.sum(1), torch.ones(samples), rtol=0, atol=1e-4)
    # Cosines of float32 divided by 0.03 are off by 33 * 6e-8; ten iterations of sums over 16,000 add to that.
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-9)
