"""Claim: a crop is torchvision's of the same filter, but for its border and a JPEG's scale.

    python benchmarks/crop_filters.py FOLDER [--size 224] [--scale 0.08 1.0] [--every 1]

Cuts four crops of every image in FOLDER with either filter, and prints the peak signal-to-noise ratio, in
decibels over all of them, beside what torchvision makes of the same boxes with either filter: of PIL images
it cuts out first, then resizes. Once of the files as they are, and once of the decoded pixels, which come at
no other scale.
"""

import argparse
import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ingest.image.decode import ImageError, decode
from pipeline.data.image.crops import GEOMETRY_DRAWS, crop_box, cut
from pipeline.recipe.data import CropGroup, Interpolation

FILTERS: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
CROPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--scale", type=float, nargs=2, default=(0.08, 1.0))
    parser.add_argument("--every", type=int, default=1, help="take every so manieth file")
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.folder.rglob("*") if path.is_file())[:: arguments.every]
    squares: dict[tuple[str, Interpolation, Interpolation], list[float]] = {}
    for path in files:
        try:
            image = decode(path.read_bytes())
        except ImageError:
            continue
        lossless = io.BytesIO()
        image.save(lossless, "BMP")
        for what, data in (("files", path.read_bytes()), ("decoded", lossless.getvalue())):
            for ours, theirs, error in compare(data, image, arguments.size, tuple(arguments.scale)):
                squares.setdefault((what, ours, theirs), []).append(error)
    print("| | ours | torchvision's bilinear, dB | bicubic, dB |\n|---|---|---|---|")
    for what in ("files", "decoded"):
        for ours in FILTERS:
            psnr = [10 * math.log10(255**2 / np.mean(squares[what, ours, theirs])) for theirs in FILTERS]
            print(f"| {what} | {ours} | {psnr[0]:.1f} | {psnr[1]:.1f} |")


def compare(
    data: bytes, image: Image.Image, size: int, scale: tuple[float, float]
) -> Iterator[tuple[Interpolation, Interpolation, float]]:
    """Mean squares of the differences of some crops, for each of our filters and each of theirs."""
    draws = np.random.default_rng(0).random((CROPS, GEOMETRY_DRAWS))
    for ours in FILTERS:
        group = CropGroup(count=CROPS, size=size, scale=scale, flip_probability=0, interpolation=ours)
        crops = np.empty((CROPS, size, size, 3), np.uint8)
        cut(data, [group], draws, [crops])
        for crop, row in zip(crops, draws.tolist(), strict=True):
            left, top, width, height = crop_box(*image.size, row, group)
            cropped = image.crop((left, top, left + width, top + height))
            for theirs, pillow in FILTERS.items():
                resized = np.asarray(cropped.resize((size, size), pillow), float)
                yield ours, theirs, float(np.square(crop - resized).mean())


if __name__ == "__main__":
    main()
