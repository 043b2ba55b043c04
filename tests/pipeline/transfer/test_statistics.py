"""Intervals and tests against their formulas, and how often they are right."""

from __future__ import annotations

from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.transfer.statistics import bootstrap_over_groups, compare_paired, holm, mean_of_seeds, wilson

Z = 1.959963984540054


@given(st.integers(1, 60_000), st.data())
def test_wilsons_interval_is_his_formula(samples: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, samples))
    share = right / samples
    centre = (share + Z**2 / (2 * samples)) / (1 + Z**2 / samples)
    half = Z / (1 + Z**2 / samples) * sqrt(share * (1 - share) / samples + Z**2 / (4 * samples**2))
    found = wilson(right, samples)
    assert found.low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert found.high == pytest.approx(min(1, centre + half), abs=1e-9)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 100), st.integers(0, 100))
def test_mcnemars_test_tosses_a_coin_for_each_image_that_one_alone_has_right(
    first_only: int, second_only: int, both: int, neither: int
) -> None:
    first = np.repeat([True, False, True, False], [first_only, second_only, both, neither])
    second = np.repeat([False, True, True, False], [first_only, second_only, both, neither])
    if not len(first):
        return
    found = compare_paired(first, second)
    total = first_only + second_only
    tail = sum(comb(total, k) for k in range(min(first_only, second_only) + 1)) / 2**total
    assert found.p == pytest.approx(min(1.0, 2 * tail if first_only != second_only else 1.0), rel=1e-9)
    assert found.difference == pytest.approx((second_only - first_only) / len(first))
    assert found.interval.low <= found.difference <= found.interval.high


def test_the_paired_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(2_000):
        cell = generator.choice(4, size=400, p=[0.06, 0.10, 0.60, 0.24])
        found = compare_paired(np.isin(cell, [0, 2]), np.isin(cell, [1, 2]))
        inside += found.interval.low <= 0.04 <= found.interval.high
    assert 0.935 < inside / 2_000 < 0.965


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9]) == [0.9]


def test_the_interval_over_seeds_is_students() -> None:
    mean, interval = mean_of_seeds([61.3, 64.4, 64.7])
    half = 4.302652729911275 * np.std([61.3, 64.4, 64.7], ddof=1) / sqrt(3)
    assert (mean, interval.high - mean) == pytest.approx((63.4666666, half))
    assert mean_of_seeds([2.0, 2.0])[1].low == 2.0
    with pytest.raises(ValueError, match="two trainings"):
        mean_of_seeds([1.0])


def test_images_of_one_group_count_as_one() -> None:
    generator = np.random.default_rng(1)
    right = np.repeat(
        generator.random(100) < 0.5, 50
    )  # fifty tiles of each photograph, all right or all wrong
    alone = bootstrap_over_groups(right, np.arange(5_000))
    grouped = bootstrap_over_groups(right, np.repeat(np.arange(100), 50))
    assert (grouped.high - grouped.low) == pytest.approx(sqrt(50) * (alone.high - alone.low), rel=0.2)
    assert grouped == bootstrap_over_groups(right, np.repeat(np.arange(100), 50))
