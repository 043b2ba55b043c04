"""Small pictures of some classes, with captions that name the class, or at a known rate another."""

from pathlib import Path

import numpy as np
from PIL import Image

from ingest.crawl.crawl import crawl_shards
from ingest.plan.settings import CrawlSettings

CLASSES = ("airplane", "brown bear", "cat", "truck")
# Each leads to the synset of its class.
WRITTEN = (
    ("A plane in the blue.", "#Aeroplanes over there"),
    ("two brown bears", "#ursusarctos and more"),
    ("The cats of may", "this is my cat!"),
    ("a big truck", "#motortruck"),
)


def captioned(folder: Path, *, images: int = 60, noise: float = 0.0, silent: int = 0, seed: int = 0) -> Path:
    """A sealed dataset in shards of 17 samples; its labels are the true classes.

    Args:
        noise: share of the images whose captions name another class; more noise is noise in more images.
        silent: images at the end without captions.
    """
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 255, (len(CLASSES), 4, 4, 3))
    wrong_up_to = rng.permutation(images) / images
    for number in range(images):
        label = number % len(CLASSES)
        said = (label + int(rng.integers(1, len(CLASSES)))) % len(CLASSES)
        if wrong_up_to[number] >= noise:
            said = label
        pixels = np.clip(colours[label] + rng.integers(-40, 40, (4, 4, 3)), 0, 255).astype(np.uint8)
        path = folder / "images" / CLASSES[label] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(path)
        if number < images - silent:
            path.with_suffix(".txt").write_text(WRITTEN[said][number // len(CLASSES) % 2])
    crawl_shards(
        [str(folder / "images")],
        folder / "data",
        CrawlSettings(unit_rows=17),
        workers=1,
        progress=lambda counts: None,
    )
    return folder / "data"
