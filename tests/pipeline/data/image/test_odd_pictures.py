"""Pictures that Pillow alone shows wrong, kept as the bytes that they were, in training and evaluation."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, features

from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import open_dataset
from ingest.plan.settings import CrawlSettings
from pipeline.data.evaluation import Preprocessing, image_batches
from pipeline.data.loader import Loader
from pipeline.recipe.data import Data

SIDE = 32
Pixels = NDArray[np.uint8]
CORNER = np.zeros((SIDE, SIDE, 3), np.uint8)
CORNER[:8, :16] = (255, 0, 0)  # no two of its turns are alike


def flat(*colour: int) -> Pixels:
    return np.full((SIDE, SIDE, 3), colour, np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes, crc: int | None = None) -> bytes:
    told = zlib.crc32(name + body) if crc is None else crc
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", told)


def png(
    row: bytes, *, depth: int, colours: int, extra: bytes = b"", end: bytes = chunk(b"IEND", b"")
) -> bytes:
    """Of equal rows."""
    head = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colours, 0, 0, 0)
    data = zlib.compress((b"\0" + row) * SIDE)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + end


def tiff_where_white_is_zero(value: int) -> bytes:
    tags = {256: SIDE, 257: SIDE, 258: 16, 259: 1, 262: 0, 273: 0, 277: 1, 278: SIDE, 279: 2 * SIDE**2}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, each, 0) for tag, each in tags.items())
    data = np.full(SIDE**2, value, "<u2").tobytes()
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def bmp_of_odd_runs() -> bytes:
    """Each row: a run of 29 pixels, and three by themselves, all of index 5."""
    row = b"\x1d\x55" + b"\0\x03\x55\x50" + b"\0\0"
    runs = row * SIDE + b"\0\1"
    palette = b"".join(bytes((3 * index, 2 * index, index, 0)) for index in range(16))
    head = struct.pack("<IiiHHIIIIII", 40, SIDE, SIDE, 1, 4, 2, len(runs), 0, 0, 16, 0)
    start = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + head + palette + runs


def gif_of_a_corner() -> bytes:
    """A red frame in a corner of the canvas, whose background is blue."""
    frame = encoded(Image.new("P", (16, 8), 0), "GIF")
    head = b"GIF89a" + struct.pack("<HHBBB", SIDE, SIDE, 0x80, 1, 0) + bytes((255, 0, 0, 0, 0, 255))
    place = frame.index(b",", 13)
    # Its own table of colours is left out: that of the whole file counts.
    table = 3 << (frame[place + 9] & 7) + 1 if frame[place + 9] & 0x80 else 0
    return head + b"," + struct.pack("<HHHHB", 0, 0, 16, 8, 0) + frame[place + 10 + table :]


def red_and_green_exchanged() -> bytes:
    """A colour profile."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")


def pictures() -> dict[str, tuple[bytes, Pixels, int]]:
    """Files, what they show, and by how many levels a lossy codec may miss it."""
    corner, on_white = Image.fromarray(CORNER), CORNER.copy()
    on_white[8:], on_white[:, 16:] = 255, 255
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.rot90(CORNER, -1)
    exchanged = {"icc_profile": red_and_green_exchanged()}
    clear = Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 16, 8))
    grey = struct.pack(">H", 0x6401) * SIDE
    damaged = chunk(b"tEXt", b"Comment\0hello", crc=7)
    found = {
        "deep_key.png": (
            png(grey, depth=16, colours=0, extra=chunk(b"tRNS", b"\0\x07")),
            flat(100, 100, 100),
            0,
        ),
        "deep_clear.png": (
            png(grey, depth=16, colours=0, extra=chunk(b"tRNS", b"\x64\1")),
            flat(255, 255, 255),
            0,
        ),
        "bad_text.png": (
            png(bytes((10, 200, 30)) * SIDE, depth=8, colours=2, extra=damaged),
            flat(10, 200, 30),
            0,
        ),
        "no_end.png": (png(bytes((10, 200, 30)) * SIDE, depth=8, colours=2, end=b""), flat(10, 200, 30), 0),
        "white_is_zero.tif": (tiff_where_white_is_zero(0x4000), flat(191, 191, 191), 0),
        "runs.bmp": (bmp_of_odd_runs(), flat(5, 10, 15), 0),
        "corner.gif": (gif_of_a_corner(), on_white, 0),
        "clear.png": (encoded(clear, "PNG"), on_white, 0),
        "profile.png": (
            encoded(Image.fromarray(flat(200, 100, 50)), "PNG", **exchanged),
            flat(100, 200, 50),
            2,
        ),
        "profile.jpg": (
            encoded(Image.fromarray(flat(200, 100, 50)), "JPEG", quality=100, subsampling=0, **exchanged),
            flat(100, 200, 50),
            4,
        ),
        "turned.jpg": (encoded(corner, "JPEG", quality=100, subsampling=0, exif=exif), turned, 6),
        "turned.png": (encoded(corner, "PNG", exif=exif), turned, 0),
        "turned.webp": (encoded(corner, "WEBP", lossless=True, exif=exif), turned, 0),
    }
    if features.check("avif"):
        options = {"quality": 100, "subsampling": "4:4:4", "speed": 10}
        found["turned.avif"] = (encoded(corner, "AVIF", exif=exif, **options), turned, 8)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "in").mkdir()
    for name, (content, _, _) in pictures().items():
        (folder / "in" / name).write_bytes(content)
    settings = CrawlSettings(unit_rows=4)
    crawl_shards([str(folder / "in")], folder / "out", settings, workers=1, progress=lambda counts: None)
    return folder / "out"


def assert_right(data: Path, keys: list[int], images: NDArray[np.uint8]) -> None:
    opened = open_dataset(data)
    names = {}
    for unit in range(len(opened.units)):
        urls = opened.kept_rows(unit, ["url"])["url"].to_pylist()
        names |= dict(zip(opened.unit_keys(unit).tolist(), urls, strict=True))
    assert sorted(names[key].rpartition("/")[2] for key in keys) == sorted(pictures())
    for key, image in zip(keys, images, strict=True):
        name = names[key].rpartition("/")[2]
        _, right, tolerance = pictures()[name]
        assert np.abs(image.astype(int) - right).max() <= tolerance, name


@pytest.mark.parametrize("resident", [False, True])
def test_training_sees_kept_bytes_as_browsers_show_them(data: Path, resident: bool) -> None:
    count = len(pictures())
    whole = {"count": 1, "size": SIDE, "scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip_probability": 0.0}
    recipe = Data.model_validate({"root": str(data), "batch_size": count, "crops": [whole]})
    loader = Loader(
        recipe, seed=0, rank=0, world_size=1, workers=0, device=torch.device("cpu"), resident=resident
    )
    _, batch = next(loader.from_step(0))
    assert_right(data, batch.keys.tolist(), batch.views["crops.0"].numpy())


def test_evaluations_see_kept_bytes_as_browsers_show_them(data: Path) -> None:
    size = Preprocessing(image_size=SIDE, resize=SIDE, mean=(0, 0, 0), std=(1, 1, 1))
    positions = np.arange(len(pictures()))
    (batch,) = image_batches(open_dataset(data), positions, preprocessing=size, workers=0)
    assert_right(data, batch.keys.tolist(), batch.images.permute(0, 2, 3, 1).numpy())
