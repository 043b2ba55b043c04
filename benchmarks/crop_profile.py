"""Claim: decoding and resizing are four fifths of what crops cost; the rest cannot win much.

    python benchmarks/crop_profile.py FOLDER [--rounds 9]

FOLDER holds JPEGs, such as `vga-images` of benchmarks/loader.py. The CPU time of each step from an image's
bytes to two crops of 224 and six of 96 pixels, on one thread, all steps in turns: the median over the rounds
of the mean over the images. `cut` decodes large images at a DCT scale, the step alone whole.
"""

import argparse
import hashlib
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ingest.image.decode import ImageLimits, decode, open_image
from pipeline.data.image.crops import GEOMETRY_DRAWS, crop_box, cut
from pipeline.data.workers import keep_freed_memory
from pipeline.recipe.data import CropGroup

GROUPS = [CropGroup(count=2, size=224, scale=(0.14, 1.0)), CropGroup(count=6, size=96, scale=(0.05, 0.14))]
OWNERS = [group for group in GROUPS for _ in range(group.count)]


class Sample:
    """An image's bytes and what its parts need, made beforehand."""

    def __init__(self, data: bytes, seed: int) -> None:
        self.data = data
        self.draws = np.random.default_rng(seed).random((len(OWNERS), GEOMETRY_DRAWS))
        self.image = decode(data)
        self.boxes = [
            crop_box(*self.image.size, row, group)
            for row, group in zip(self.draws.tolist(), OWNERS, strict=True)
        ]
        self.crops = self.resized()

    def resized(self) -> list[Image.Image]:
        return [
            self.image.resize(
                (group.size, group.size), Image.Resampling.BILINEAR, (x, y, x + width, y + height)
            )
            for group, (x, y, width, height) in zip(OWNERS, self.boxes, strict=True)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    files = [path for path in sorted(arguments.folder.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
    samples = [Sample(path.read_bytes(), number) for number, path in enumerate(files[:120])]
    room = [np.empty((group.count, group.size, group.size, 3), np.uint8) for group in GROUPS]
    targets = [target for group in room for target in group]

    def copied(sample: Sample) -> None:
        for crop, target in zip(sample.crops, targets, strict=True):
            target[...] = np.frombuffer(crop.tobytes(), np.uint8).reshape(target.shape)

    def flipped(sample: Sample) -> None:
        for target in targets[::2]:  # half of them
            pixels = torch.from_numpy(target)
            pixels.copy_(torch.flip(pixels, (1,)))

    parts: dict[str, Callable[[Sample], object]] = {
        "sha256": lambda sample: hashlib.sha256(sample.data).digest(),
        "header, bounds, EXIF": lambda sample: open_image(sample.data, ImageLimits()),
        "decoded by libjpeg-turbo": lambda sample: Image.open(io.BytesIO(sample.data)).load(),
        "eight crops resized": Sample.resized,
        "crops to bytes, and copied": copied,
        "half of them flipped": flipped,
        "all of it, by `cut`": lambda sample: cut(sample.data, GROUPS, sample.draws, room),
    }
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(arguments.rounds):
        for name, part in parts.items():
            start = time.process_time()
            for sample in samples:
                part(sample)
            taken[name].append((time.process_time() - start) / len(samples) * 1e6)
    print("| part | us per image | range |\n|---|---|---|")
    for name, values in taken.items():
        print(f"| {name} | {statistics.median(values):.0f} | {min(values):.0f} to {max(values):.0f} |")


if __name__ == "__main__":
    main()
