"""The peer of benchmarks/loader.py: what people write over `webdataset` and PIL.

It imports nothing of this project and runs under any Python that has webdataset, numpy and a Pillow, so that
stock Pillow can be measured from its own environment. Prints one JSON line: samples per second of CPU time,
or of wall time for `raw`.
"""

import argparse
import json
import math
import os
import random
import time
import warnings
from collections.abc import Callable

import numpy as np
import PIL
import webdataset as wds
from PIL import Image, ImageEnhance, ImageFilter

GROUPS = [(2, 224, 0.14, 1.0), (6, 96, 0.05, 0.14)]
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def random_resized_crop(image: Image.Image, size: int, low: float, high: float) -> Image.Image:
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(low, high)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = random.randint(0, width - w), random.randint(0, height - h)
    crop = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop


def turn_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(turns * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned, "L"), saturation, value)).convert("RGB")


def colour(image: Image.Image) -> np.ndarray:
    """SwAV's chain: jitter 0.8/0.8/0.8/0.2 in random order (p 0.8), grey (0.2), blur (0.5), normalise."""
    if random.random() < 0.8:
        operations: list[Callable[[Image.Image], Image.Image]] = [
            lambda x: ImageEnhance.Brightness(x).enhance(random.uniform(0.2, 1.8)),
            lambda x: ImageEnhance.Contrast(x).enhance(random.uniform(0.2, 1.8)),
            lambda x: ImageEnhance.Color(x).enhance(random.uniform(0.2, 1.8)),
            lambda x: turn_hue(x, random.uniform(-0.2, 0.2)),
        ]
        random.shuffle(operations)
        for operation in operations:
            image = operation(image)
    if random.random() < 0.2:
        image = Image.merge("RGB", (image.convert("L"),) * 3)
    if random.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    return ((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


def crops(image: Image.Image, finish: Callable[[Image.Image], np.ndarray]) -> list[np.ndarray]:
    return [
        np.stack([finish(random_resized_crop(image, size, low, high)) for _ in range(count)])
        for count, size, low, high in GROUPS
    ]


def measure_crops(shards: list[str], passes: int, finish: Callable[[Image.Image], np.ndarray]) -> float:
    """Source images per CPU second."""
    dataset = wds.WebDataset(shards, shardshuffle=False).decode("pilrgb").to_tuple("jpg;png")
    for number, (image,) in enumerate(dataset):
        crops(image, finish)
        if number == 8:
            break
    done, start = 0, time.process_time()
    for _ in range(passes):
        for (image,) in dataset:
            crops(image, finish)
            done += 1
    return done / (time.process_time() - start)


def measure_raw(shards: list[str], passes: int, workers: int) -> float:
    """Samples per second of wall time, after the first one has arrived."""
    dataset = wds.WebDataset(shards, shardshuffle=False, empty_check=False).repeat(passes)
    source = wds.WebLoader(dataset, batch_size=None, num_workers=workers) if workers else dataset
    samples = iter(source)
    next(samples)
    start = time.perf_counter()
    done = sum(len(sample["jpg"]) > 0 for sample in samples)
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["crops", "colour", "raw"])
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--core", type=int)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    if options.what == "raw":
        rate = measure_raw(options.shards, options.passes, options.workers)
    else:
        finish = colour if options.what == "colour" else np.asarray
        rate = measure_crops(options.shards, options.passes, finish)
    print(json.dumps({"rate": rate, "pillow": PIL.__version__}))


if __name__ == "__main__":
    main()
