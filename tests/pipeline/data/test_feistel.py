"""The keyed permutations are permutations, and look like shuffles."""

import numpy as np
from hypothesis import given
from hypothesis.strategies import integers, lists

from pipeline.data.feistel import derive_key, permute

keys = integers(0, 2**70)


@given(size=integers(1, 3_000), key=keys)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    out = permute(np.arange(size), size, derive_key(key))
    assert np.array_equal(np.sort(out), np.arange(size))


@given(sizes=lists(integers(1, 200), min_size=1, max_size=5), key=keys)
def test_several_permutations_at_once_equal_one_at_a_time(sizes: list[int], key: int) -> None:
    index = np.concatenate([np.arange(size) for size in sizes])
    size = np.repeat(sizes, sizes)
    number = np.repeat(np.arange(len(sizes)), sizes)
    together = permute(index, size, derive_key(key, number))
    apart = [permute(np.arange(n), n, derive_key(key, place)) for place, n in enumerate(sizes)]
    assert np.array_equal(together, np.concatenate(apart))


def test_large_sizes_stay_inside_and_do_not_collide() -> None:
    size = 10**12
    out = permute(np.arange(100_000) * 9_999_991, size, derive_key(1))
    assert out.min() >= 0
    assert out.max() < size
    assert len(np.unique(out)) == 100_000


def test_every_place_is_equally_likely() -> None:
    """Chi-square over 20,000 keys: with 11 × 11 cells, 110 degrees of freedom give 110 ± 15."""
    size, trials = 11, 20_000
    out = permute(np.tile(np.arange(size), trials), size, np.repeat(derive_key(7, np.arange(trials)), size))
    counts = np.zeros((size, size))
    np.add.at(counts, (np.tile(np.arange(size), trials), out), 1)
    chi_square = ((counts - trials / size) ** 2 / (trials / size)).sum()
    assert 50 < chi_square < 180


def test_neighbours_part() -> None:
    """In a random permutation of n, 2/n of the neighbouring pairs stay neighbours."""
    out = permute(np.arange(100_000), 100_000, derive_key(3))
    assert (np.abs(np.diff(out)) == 1).sum() < 20


def test_keys_depend_on_every_part_and_its_place() -> None:
    made = {int(derive_key(*parts)[0]) for parts in [(1, 2), (2, 1), (1,), (2,), (1, 2, 0), (0, 1, 2)]}
    assert len(made) == 6
