"""Philox against its authors' vectors, and draws that depend on what they are for alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists

from pipeline.data.philox import philox4x32, uniforms

FULL = 0xFFFF_FFFF


# From the `kat_vectors` file that comes with Random123.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox4x32(tuple(np.array([word], np.uint64) for word in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word[0]) for word in words) == expected


@given(
    keys=lists(integers(0, 2**43), min_size=1, max_size=6, unique=True),
    views=integers(1, 8),
    draws=integers(1, 40),
)
def test_draws_do_not_depend_on_neighbours(keys: list[int], views: int, draws: int) -> None:
    ahead = np.zeros(len(keys), np.int64)
    together = uniforms(seed=3, epoch=1, keys=keys, ahead=ahead, views=views, draws=draws)
    assert together.shape == (len(keys), views, draws)
    for number, key in enumerate(keys):
        alone = uniforms(seed=3, epoch=1, keys=[key], ahead=[0], views=views + 2, draws=draws)
        assert np.array_equal(alone[0, :views], together[number])


def test_every_coordinate_changes_the_draws() -> None:
    def draw(**changes: object) -> bytes:
        values = {"seed": 1, "epoch": 2, "keys": [3], "ahead": [0], "views": 2, "draws": 8} | changes
        return uniforms(**values).tobytes()  # type: ignore[arg-type]

    changed = [
        draw(),
        draw(seed=2),
        draw(epoch=3),
        draw(keys=[4]),
        draw(keys=[3 + 2**32]),
        draw(ahead=[1]),
    ]
    assert len(set(changed)) == len(changed)
    views = uniforms(seed=1, epoch=2, keys=[3], ahead=[0], views=2, draws=8)[0]
    assert not np.any(views[0] == views[1])


def test_draws_are_uniform() -> None:
    """Mean and variance of 320,000 uniform numbers: 1/2 ± 0.0005 and 1/12 ± 0.00013 (one sigma)."""
    drawn = uniforms(seed=0, epoch=0, keys=np.arange(4_000), ahead=np.zeros(4_000), views=2, draws=40)
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert abs(drawn.mean() - 1 / 2) < 0.003
    assert abs(drawn.var() - 1 / 12) < 0.001
    flat = drawn.reshape(-1)
    assert abs(np.corrcoef(flat[:-1], flat[1:])[0, 1]) < 0.01
