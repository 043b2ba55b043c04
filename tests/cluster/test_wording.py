"""Numbers for people."""

import pytest

from cluster.wording import duration, in_bytes, several


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (99_951, "100 kB"),
        (999_499, "999 kB"), (999_501, "1.0 MB"), (250_000_000, "250 MB"), (1e12, "1.0 TB"),
        (3.4e15, "3,400.0 TB"),
    ],
)  # fmt: skip
def test_bytes(count, text):
    assert in_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (7260, "2 h 1 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_several():
    assert [several(count, "unit") for count in (0, 1, 2, 1234)] == [
        "0 units",
        "1 unit",
        "2 units",
        "1,234 units",
    ]
