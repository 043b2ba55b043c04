"""A file beside the images that says what they show: --labels FILE.

CSV, TSV, JSON, JSON Lines and Parquet have a column for the image (a path, a name, or a key) and one for its
labels; `split` and `ignore` are taken if they are there. A text file has a line `image label` per image. All
values are text, whatever they look like. Some files are known by their form:

Kaggle's LOC_*_solution.csv            ImageId, PredictionString: every fifth word is a class
ILSVRC2012_validation_ground_truth.txt a number per image, in the order of their numbers; if the devkit's
                                       meta.mat lies beside it, the numbers' WordNet ids
places365_val.txt                      a number per image; if categories_places365.txt lies beside it, the
                                       names that it gives the numbers
instances_*.json, val2018.json         COCO's form, which iNaturalist has, too
ImageSets/Main                         VOC's folder, see `ingest.labels.voc`

What is read is held in memory, within a bound: some 150 bytes an image.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from cluster.errors import UserError
from ingest.fence.reading import read_fenced
from ingest.labels.label_rows import TRUTH, rows
from ingest.labels.said import Said, joined
from ingest.labels.voc import files_in_folder, read_split_files
from ingest.sources.companions import MOST_LABELS
from ingest.sources.expand import refuse_malformed
from ingest.sources.remote_trouble import reading
from ingest.sources.url_list import list_format
from ingest.store.files import open_file

# Bytes, for all images that a list names; for each, besides its name;
# and for each label of further rows.
_MOST_HELD, _HELD_PER_IMAGE, _HELD_PER_LABEL = 3 << 29, 130, 50


@dataclass(frozen=True, kw_only=True)
class LabelList:
    """What a file says of images.

    Attributes:
        identity: its name and digest, for the fingerprint.
        said: by the image's path, name or key, as the file has it.
        has_labels: it says labels, and not only splits or what to ignore.
        unnamed: the labels are numbers whose names were not found.
    """

    identity: str
    said: Mapping[str, Said]
    has_labels: bool = True
    unnamed: bool = False


def read_label_list(location: str) -> LabelList:
    """Read a file of labels; a path, or a URL.

    Raises:
        UserError: it cannot be read, or does not say which column is the image and which its labels.
    """
    if "://" not in location and Path(location).is_dir():
        return _voc_folder(Path(location))
    refuse_malformed(location)
    found = list_format(location)
    if found is None:
        raise UserError(
            f"--labels {location} is not named like a list: use .csv, .tsv, .json, .jsonl, .parquet, .txt, "
            "any of them with .gz or .zst, or VOC's folder ImageSets/Main"
        )
    kind, compression = found
    with _opened(location) as file:
        digest = hashlib.file_digest(file, "sha256")
    identity = identity_of(_name(location), digest)
    with _opened(location) as file, ExitStack() as stack:
        tables = read_fenced(
            rows,
            [file, *(stack.enter_context(path.open("rb")) for path in _beside(location))],
            {"location": location, "name": _name(location), "kind": kind},
            place=f"--labels {location}",
            compression=compression,
        )
        said, about = _collected(tables, location)
    named = about.get(b"names", b"").decode()
    return LabelList(
        identity=f"{identity}{named}",
        said=said,
        has_labels=not about.get(b"no_labels"),
        unnamed=bool(about.get(b"unnamed")),
    )


def _collected(tables: Iterator[pa.Table], location: str) -> tuple[dict[str, Said], Mapping[bytes, bytes]]:
    """What is said of each image, and what the last table tells of the names of labels.

    Raises:
        UserError: it contradicts itself, or is too much.
    """
    said: dict[str, Said] = {}
    about: Mapping[bytes, bytes] = {}
    left = _MOST_HELD
    listed: list[Said] = []
    for new, batch in zip(tables, tables, strict=True):
        about = new.schema.metadata or {}
        listed += [
            Said(tuple(each["labels"]), each["split"], tuple(each["ignore"])) for each in new.to_pylist()
        ]
        columns = (batch[name].to_pylist() for name in ("row", "image", "said"))
        for number, written, code in zip(*columns, strict=True):
            image = written.removeprefix("./")  # as `find` writes paths
            before, new_said = said.get(image), listed[code]
            both = new_said if before is None else joined(before, new_said)
            if both is None:
                raise UserError(
                    f"--labels {location}, row {number}: {image} is in the split {new_said.split}, and "
                    f"before in {said[image].split}"
                )
            if both == before:
                continue
            if max(len(both.labels), len(both.ignore)) > MOST_LABELS:
                raise UserError(
                    f"--labels {location}, row {number}: {image} has more than {MOST_LABELS:,} labels: give "
                    "those that it shows"
                )
            if before is None:
                left -= len(image) + _HELD_PER_IMAGE
            else:  # this image's alone
                left -= _HELD_PER_LABEL * (len(new_said.labels) + len(new_said.ignore) + 1)
            if left < 0:
                raise UserError(
                    f"--labels {location} names more than {len(said):,} images, which take too much "
                    "memory: crawl the sources in parts, each with its own list"
                )
            said[image] = both
    return said, about


def _name(location: str) -> str:
    """Of a URL, without its query: one that is signed is another each time, and nobody else's."""
    return PurePosixPath(urlsplit(location).path if "://" in location else location).name


def _beside(location: str) -> list[Path]:
    """The file beside the list that has names for its numbers, if there is one."""
    name = _name(location)
    if "://" in location or not (TRUTH.fullmatch(name) or name.startswith("places365")):
        return []
    path = Path(location).parent / ("meta.mat" if TRUTH.fullmatch(name) else "categories_places365.txt")
    return [path] if path.is_file() else []


def identity_of(name: str, digest: Any) -> str:
    """A file in the fingerprint of what was made with it, by the digest of its bytes."""
    return f"{name} (sha256 {digest.hexdigest()[:16]})"


@contextmanager
def _opened(location: str) -> Iterator[io.BufferedIOBase]:
    try:
        with (
            reading(f"--labels {location}"),
            open_file(location if "://" in location else Path(location)) as file,
        ):
            yield file
    except ValueError as error:
        raise UserError(f"--labels {location} cannot be opened: {error}") from error


def _voc_folder(folder: Path) -> LabelList:
    files = files_in_folder(folder)
    if not files:
        raise UserError(
            f"--labels {folder} has no file like aeroplane_train.txt: give VOC's ImageSets/Main, or a file"
        )
    return voc_list(files)


def voc_list(files: Mapping[str, bytes]) -> LabelList:
    """The labels in VOC's split files."""
    digests = "".join(f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(files.items()))
    return LabelList(
        identity=identity_of("ImageSets/Main", hashlib.sha256(digests.encode())), said=read_split_files(files)
    )
