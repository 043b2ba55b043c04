"""Datasets with captions."""

from pathlib import Path

import pytest
from captioned import captioned


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of four classes, the last 8 without captions; never written to."""
    return captioned(tmp_path_factory.mktemp("captioned"), silent=8)
