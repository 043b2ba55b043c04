"""Sealed datasets of small pictures for the data tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_pictures import make_dataset


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 pictures in seven shards of odd sizes; never written to."""
    return make_dataset(tmp_path_factory.mktemp("small"), images=45, unit_rows=7)


@pytest.fixture
def own_dataset(tmp_path: Path) -> Callable[..., Path]:
    """own_dataset(images=, unit_rows=, size=): one that the test may damage."""
    return lambda **sizes: make_dataset(tmp_path, **sizes)
