"""Close pairs of hashes, against comparing each with each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.dedup.hamming import MAX_RADIUS, band_values, bands, close_pairs


def all_pairs(hashes, radius):
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    first, second = np.nonzero(np.triu(distance <= radius, 1))
    return dict(zip(zip(first.tolist(), second.tolist(), strict=True), distance[first, second], strict=True))


@st.composite
def clusters(draw, radius):
    """Distinct hashes, ascending, many of them at distances around the radius."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
    flips = st.sets(st.integers(0, 63), max_size=radius + 2)
    near = draw(st.lists(st.tuples(st.sampled_from(centres), flips), max_size=20))
    moved = [centre ^ sum(1 << bit for bit in bits) for centre, bits in near]
    return np.unique(np.array(centres + moved, np.uint64))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data(), radius=st.integers(0, MAX_RADIUS))
def test_every_pair_is_found_and_no_other(data, radius):
    hashes = data.draw(clusters(radius))
    found = {}
    for band in range(radius + 1):
        pairs = close_pairs(hashes, radius=radius, band=band)
        ends = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
        assert len(set(ends)) == len(ends)
        values = band_values(hashes, radius, band)
        assert np.array_equal(values[pairs.first], values[pairs.second])
        found.update(zip(ends, pairs.distance, strict=True))
        assert pairs.hot_buckets == pairs.not_compared == 0
    assert found == all_pairs(hashes, radius)


@pytest.mark.parametrize("radius", range(MAX_RADIUS + 1))
def test_bands_cover_all_bits_once(radius):
    parts = bands(64, radius)
    assert [start for start, _ in parts] == list(np.cumsum([0] + [length for _, length in parts])[:-1])
    assert sum(length for _, length in parts) == 64
    assert max(length for _, length in parts) - min(length for _, length in parts) <= 1


def test_a_hot_bucket_is_capped_and_told():
    # 100 hashes that differ in the last part of the last band only: one bucket in 3 tables of band 0.
    hashes = np.arange(100, dtype=np.uint64)
    whole = close_pairs(hashes, radius=3, band=0)
    capped = close_pairs(hashes, radius=3, band=0, reach=10)
    assert (whole.hot_buckets, whole.not_compared) == (0, 0)
    assert len(whole.first) == len(all_pairs(hashes, 3))
    assert (capped.hot_buckets, capped.hot_members) == (3, 300)
    assert capped.not_compared == 3 * sum(100 - lag for lag in range(11, 100))
    assert capped.compared + capped.not_compared == whole.compared
    near = {pair for pair in all_pairs(hashes, 3) if pair[1] - pair[0] <= 10}
    assert set(zip(capped.first.tolist(), capped.second.tolist(), strict=True)) == near


def test_nothing_and_one_hash_have_no_pairs():
    for count in (0, 1):
        pairs = close_pairs(np.arange(count, dtype=np.uint64), radius=3, band=1)
        assert len(pairs.first) == len(pairs.second) == len(pairs.distance) == 0
