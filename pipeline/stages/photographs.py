"""Tiles cut from photographs: a small dataset with labels, for trying everything out offline.

Without a folder of the user's, the photographs are those that scikit-image ships inside its package. A
tile's label is the photograph it was cut from, and training and test tiles come from separate regions of it
with a gap between. Test tiles are grey, so that colour alone does not give the photograph away.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import tarfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from ingest.image.decode import ImageError, ImageLimits, decode
from pipeline.dag.digests import folder_identity, list_files
from pipeline.recipe.stages import PhotographsRecipe

# Photographs and textures of scikit-image >= 0.25 that are in the wheel itself; the drawings, the texts and
# the second picture of the stereo pair are left out.
SHIPPED = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
_WORKING_PIXELS = 300_000  # a larger picture is reduced first: keeps 400 of them within 400 MB
_PICTURES_TO_SPLIT = 4  # a label with fewer is split within each picture
_DRAWS_FOR_CONTRAST = 20
_OVERVIEW = 24


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A decoded picture, its label, and which split it belongs to; None when it is split within."""

    name: str
    label: str
    image: Image.Image
    split: Literal["train", "test"] | None = None


@dataclass(frozen=True, kw_only=True)
class Album:
    """The pictures that could be used, and how many files could not, by reason."""

    origin: str
    labels_are: Literal["photograph", "folder"]
    pictures: list[Picture]
    skipped: dict[str, int]


def cut_tiles(recipe: PhotographsRecipe, folder: Path) -> dict[str, Any]:
    """Write `train.tar`, `test.tar` (members `label/000123.jpg`, shuffled) and `photographs.json` into a
    folder.

    Returns:
        Counts, for the receipt.

    Raises:
        UserError: if there are fewer than two labels to tell apart.
    """
    album = read_folder(Path(recipe.images), recipe) if recipe.images is not None else read_shipped()
    labels = sorted({picture.label for picture in album.pictures})
    if len(labels) < 2:
        skipped = sum(album.skipped.values())
        raise UserError(
            f"{album.origin} has {len(album.pictures)} usable pictures ({skipped} files skipped), which make "
            f"{len(labels)} label(s): give at least two pictures, or two sub-folders with pictures"
        )
    folder.mkdir(parents=True, exist_ok=True)
    counts = {
        split: _write_tar(album.pictures, labels, recipe, split, folder / f"{split}.tar")
        for split in ("train", "test")
    }
    description = {
        "origin": album.origin,
        "labels_are": album.labels_are,
        "labels": labels,
        "pictures": len(album.pictures),
        "split_whole": sum(picture.split is not None for picture in album.pictures),
        "train_tiles": counts["train"],
        "test_tiles": counts["test"],
        "skipped": album.skipped,
        "overview": _write_overview(album.pictures, recipe, folder),
    }
    write_atomically(folder / "photographs.json", json.dumps(description, indent=2) + "\n")
    return {
        "labels": len(labels),
        "pictures": len(album.pictures),
        "skipped_files": sum(album.skipped.values()),
        "train_tiles": counts["train"],
        "test_tiles": counts["test"],
    }


def identity(recipe: PhotographsRecipe) -> str:
    """What the tiles depend on besides the recipe: changed pictures have another identity."""
    if recipe.images is not None:
        return folder_identity(Path(recipe.images))
    digest = hashlib.sha256()
    for path in _shipped_paths():
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def read_shipped() -> Album:
    """The photographs inside scikit-image; each is its own label."""
    pictures = [
        Picture(
            name=path.name, label=path.stem, image=_reduced(decode(path.read_bytes(), limits=ImageLimits()))
        )
        for path in _shipped_paths()
    ]
    return Album(
        origin="the photographs inside scikit-image", labels_are="photograph", pictures=pictures, skipped={}
    )


def read_folder(root: Path, recipe: PhotographsRecipe) -> Album:
    """A user's pictures, at most `max_pictures` of them, drawn evenly over the labels.

    First-level sub-folders are the labels if at least two of them hold files; pictures beside them are then
    skipped.
    """
    names = list_files(root)
    groups = defaultdict(list)
    for name in names:
        groups[name.split("/")[0] if "/" in name else ""].append(name)
    by_folder = len(groups.keys() - {""}) >= 2
    loose = len(groups.pop("", [])) if by_folder else 0
    if not by_folder:
        groups = defaultdict(list, {name: [name] for name in names})
    rng = np.random.default_rng([recipe.seed, 0])
    queue = []
    for label in sorted(groups):
        for turn, index in enumerate(rng.permutation(len(groups[label]))):
            queue.append((turn, 0.0 if by_folder else rng.random(), label, groups[label][index]))
    pictures: list[Picture] = []
    broken: Counter[str] = Counter()
    least = recipe.tile_size // 2
    for _, _, label, name in sorted(queue):
        # Broken files must not use up the places of good ones, nor make the search endless.
        if len(pictures) == recipe.max_pictures or sum(broken.values()) > 10 * recipe.max_pictures:
            break
        try:
            with warnings.catch_warnings():
                # Pillow's remarks on damaged files: they are counted instead.
                warnings.simplefilter("ignore")
                image = _reduced(decode(_bounded_bytes(root / name)))
        except ImageError as error:
            broken[error.reason] += 1
            continue
        if min(_region(image, recipe, "test")[2:]) < least:
            broken["too small"] += 1
            continue
        pictures.append(Picture(name=name, label=_safe(label), image=image))
    enough = len(queue) - len(pictures) - sum(broken.values())
    skipped = {**broken, "not in a sub-folder": loose, "not needed: enough pictures": enough}
    if by_folder:
        pictures = _split_whole(pictures)
    return Album(
        origin=str(root),
        labels_are="folder" if by_folder else "photograph",
        pictures=pictures,
        skipped={reason: count for reason, count in sorted(skipped.items()) if count},
    )


def _split_whole(pictures: list[Picture]) -> list[Picture]:
    """A quarter of a label's pictures is for testing when it has enough of them; their order was drawn."""
    groups = defaultdict(list)
    for picture in pictures:
        groups[picture.label].append(picture)
    result: list[Picture] = []
    for members in groups.values():
        if len(members) < _PICTURES_TO_SPLIT:
            result += members
            continue
        tests = len(members) // 4
        for index, picture in enumerate(members):
            split: Literal["train", "test"] = "test" if index < tests else "train"
            result.append(Picture(name=picture.name, label=picture.label, image=picture.image, split=split))
    return result


def _write_tar(
    pictures: list[Picture], labels: list[str], recipe: PhotographsRecipe, split: str, path: Path
) -> int:
    """Cut the tiles of one split, shuffle them, and write them with nothing volatile beside them."""
    total = recipe.train_tiles if split == "train" else recipe.test_tiles
    tiles = []
    for number, label in enumerate(labels):
        members = [p for p in pictures if p.label == label and p.split in (None, split)]
        wanted = total // len(labels) + (number < total % len(labels))
        for index, picture in enumerate(members):
            count = wanted // len(members) + (index < wanted % len(members))
            rng = np.random.default_rng([recipe.seed, 1, int(split == "test"), number, index])
            tiles += [(label, data) for data in _tiles(picture, recipe, split, count, rng)]
    order = np.random.default_rng([recipe.seed, 2, int(split == "test")]).permutation(len(tiles))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, index in enumerate(order):
            label, data = tiles[index]
            member = tarfile.TarInfo(f"{label}/{number:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    temporary.replace(path)
    return len(tiles)


def _tiles(
    picture: Picture, recipe: PhotographsRecipe, split: str, count: int, rng: np.random.Generator
) -> Iterator[bytes]:
    """Squares at drawn places and sizes of the split's region, as JPEG."""
    left, top, width, height = _region(picture.image, recipe, None if picture.split == split else split)
    low, high = (share * min(picture.image.size) for share in recipe.cover)
    for _ in range(count):
        for _ in range(_DRAWS_FOR_CONTRAST):
            side = min(low + (high - low) * rng.random(), width, height)
            x, y = left + (width - side) * rng.random(), top + (height - side) * rng.random()
            size = (recipe.tile_size, recipe.tile_size)
            tile = picture.image.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
            grey = tile.convert("L")
            if np.asarray(grey).std() >= 255 * recipe.min_contrast:
                break
        buffer = io.BytesIO()
        (grey if split == "test" else tile).save(buffer, "JPEG", quality=95, subsampling=0)
        yield buffer.getvalue()


def _region(
    image: Image.Image, recipe: PhotographsRecipe, split: str | None
) -> tuple[float, float, float, float]:
    """Left, top, width and height of a split's part of a picture; all of it for None."""
    shares = {
        None: (0.0, 1.0),
        "train": (0.0, recipe.train_share),
        "test": (recipe.train_share + recipe.gap, 1.0),
    }
    start, end = shares[split]
    if image.width >= image.height:
        return start * image.width, 0.0, (end - start) * image.width, image.height
    return 0.0, start * image.height, image.width, (end - start) * image.height


def _write_overview(pictures: list[Picture], recipe: PhotographsRecipe, folder: Path) -> list[dict[str, Any]]:
    """Small copies of the first pictures, for the report, with where their regions lie."""
    (folder / "overview").mkdir(exist_ok=True)
    rows = []
    for index, picture in enumerate(pictures[:_OVERVIEW]):
        small = picture.image.copy()
        small.thumbnail((320, 320))
        small.save(folder / "overview" / f"{index:02d}.jpg", quality=85)
        rows.append(
            {
                "file": f"overview/{index:02d}.jpg",
                "name": _safe(picture.name),
                "label": picture.label,
                "split": picture.split,
                "horizontal": picture.image.width >= picture.image.height,
                "train_end": recipe.train_share,
                "test_start": recipe.train_share + recipe.gap,
            }
        )
    return rows


def _shipped_paths() -> list[Path]:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise UserError(
            "the demo's photographs come inside scikit-image, which is not installed: "
            "pip install scikit-image, or give a folder with your own pictures"
        )
    paths = [Path(package.origin).parent / "data" / name for name in SHIPPED]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"this scikit-image does not ship {', '.join(missing)}: "
            "pip install 'scikit-image>=0.25', or give a folder with your own pictures"
        )
    return paths


def _bounded_bytes(path: Path) -> bytes:
    """A file's bytes, never more than one over the limit that `decode` refuses."""
    with path.open("rb") as file:
        return file.read(ImageLimits().max_bytes + 1)


def _reduced(image: Image.Image) -> Image.Image:
    scale = (_WORKING_PIXELS / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _safe(label: str) -> str:
    """A label as a folder's name inside a tar."""
    cleaned = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in label)
    return cleaned.encode("utf-8", "replace").decode().lstrip(".") or "_"
