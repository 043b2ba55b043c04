"""Clips that several tests look at."""

from pathlib import Path

import pytest
from clip_datasets import seal_clips, small_units


@pytest.fixture(scope="session")
def clip_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 clips in three shards of odd sizes; never written to."""
    return seal_clips(tmp_path_factory.mktemp("clips"), small_units([9, 5, 7]))
