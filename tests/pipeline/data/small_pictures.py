"""Small pictures, and sealed datasets of them."""

from pathlib import Path

import numpy as np
from PIL import Image

from ingest.crawl.crawl import crawl_shards
from ingest.plan.settings import CrawlSettings


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A smooth picture without symmetry, different for each seed."""
    rough = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def make_dataset(folder: Path, *, images: int, unit_rows: int, size: tuple[int, int] | None = None) -> Path:
    """Of pictures of one size, or each of another."""
    for number in range(images):
        path = folder / "images" / f"{number:04d}.{('jpg', 'png')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, *(size or (20 + number % 5, 16 + number % 3))).save(path)
    settings = CrawlSettings(unit_rows=unit_rows)
    crawl_shards([str(folder / "images")], folder / "data", settings, workers=1, progress=lambda counts: None)
    return folder / "data"
