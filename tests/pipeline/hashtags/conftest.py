"""Datasets with captions, and their tags."""

from collections.abc import Callable
from pathlib import Path

import pytest
from captioned import captioned

from cluster.map.processes import processes
from ingest.dataset.open import Dataset
from pipeline.data.tags import Tags, open_tags
from pipeline.hashtags.make_tags import make_tags
from pipeline.recipe.stages import HashtagsRecipe


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of four classes, the last 8 without captions; never written to."""
    return captioned(tmp_path_factory.mktemp("captioned"), silent=8)


@pytest.fixture(scope="session")
def made() -> Callable[..., Tags]:
    """made(DATASET, FOLDER, workers=, …): tags by a recipe with these keys."""

    def make(dataset: Dataset, folder: Path, *, workers: int = 1, **recipe: object) -> Tags:
        folder.mkdir(exist_ok=True)
        values = HashtagsRecipe.model_validate({"min_images": 2} | recipe)
        with processes(workers) as map_tasks:
            make_tags(dataset, values, folder, map_tasks=map_tasks)
        return open_tags(folder)

    return make
