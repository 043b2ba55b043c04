"""What `submit plan` says that an object store is asked for."""

from typing import Any

import pytest

from cluster.typed_yaml import load_recipe
from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import Dataset, open_dataset, sealed_head
from ingest.plan.settings import CrawlSettings
from pipeline.commands.plan import _of_reading, _reading
from pipeline.plan.reading import reading
from pipeline.recipe.pretrain import PretrainRecipe


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """64 pictures in units of 8."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("plan")
    for number in range(64):
        path = folder / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    settings = CrawlSettings(unit_rows=8)
    crawl_shards([str(folder / "images")], folder / "data", settings, workers=1, progress=lambda counts: None)
    return open_dataset(folder / "data")


def recipe(dataset: Dataset, **changes: Any) -> PretrainRecipe:
    words = [f"data.root={dataset.path}", *(f"{key}={value}" for key, value in changes.items())]
    sizes = ["data.batch_size=16", "data.window=8", *words]
    return load_recipe(PretrainRecipe, "cifar10_swav", sizes, kind="pretrain")


def test_windows_that_fit_are_read_in_few_requests(dataset: Dataset) -> None:
    asked = reading(recipe(dataset), dataset, nodes=2, images_per_second=128)
    # Each node has four of the eight lanes, of one window of 8 images, in one or two units.
    assert asked.coalesced
    assert 4 <= asked.requests <= 10
    assert asked.bytes > sealed_head(dataset.path, dataset.root).bytes / 2
    # Both nodes together are through an epoch in half a second.
    assert asked.requests_per_second == pytest.approx(2 * asked.requests * 2)
    assert asked.bytes_per_second == pytest.approx(2 * asked.bytes * 2)


def test_without_room_for_windows_each_image_is_a_request(dataset: Dataset) -> None:
    small = recipe(dataset, **{"run.cache_gib": 1e-5})
    asked = reading(small, dataset, nodes=1, images_per_second=64)
    assert not asked.coalesced
    assert (asked.requests, asked.requests_per_second) == (64, 64)
    assert asked.bytes == pytest.approx(sealed_head(dataset.path, dataset.root).bytes)
    said = _of_reading(asked, 1)
    assert said.startswith("Images are read one by one") and "do not fit run.cache_gib" in said


def test_a_cache_that_a_run_refuses_is_told_before(dataset: Dataset) -> None:
    asked = reading(recipe(dataset, **{"run.cache_gib": 1e-6}), dataset, nodes=1, images_per_second=64)
    assert "the run will be refused" in _of_reading(asked, 1)


def test_nodes_that_share_a_lane_read_no_windows(dataset: Dataset) -> None:
    asked = reading(recipe(dataset, **{"data.window": 64}), dataset, nodes=2, images_per_second=1)
    assert not asked.coalesced
    assert asked.reason == "2 nodes share lanes of the shuffle, and no window is read whole"
    assert "requests/s" in _of_reading(asked, 2)


def test_a_folder_is_asked_for_nothing(dataset: Dataset) -> None:
    said = _reading(recipe(dataset), 1, images_per_second=1)
    assert said == f"The images are read from {dataset.path}, as they are needed."
