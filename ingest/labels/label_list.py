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

What is read is held in memory: some 150 bytes an image.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest.labels.said import Said, joined
from ingest.labels.voc import files_in_folder, read_split_files
from ingest.sources.expand import refuse_malformed
from ingest.sources.folder_metadata import csv_rows
from ingest.sources.remote_trouble import reading
from ingest.sources.text_blocks import as_utf8
from ingest.sources.url_list import list_format, split_labels
from ingest.store.files import open_file

IMAGE_NAMES = (
    *("path", "file_name", "filename", "file", "image_path", "url", "name", "key", "image", "image_name"),
    *("image_id", "imageid", "id"),
)
# One label, whatever is in it; and several, between commas.
ONE_LABEL = ("label", "class", "class_name", "category", "target", "wnid")
MANY_LABELS = ("labels", "classes", "tags", "hashtags")
_TRUTH = re.compile(r"(ILSVRC\d{4})_validation_ground_truth\.txt")


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
    data = _read(location)
    identity = identity_of(_name(location), data)
    try:
        if compression is not None:
            data = pa.CompressedInputStream(io.BytesIO(data), compression).read()
        if kind != "parquet":
            data = as_utf8(data)
        if kind == "txt":
            return _text_list(location, identity, data.decode())
        said, used = _collected(location, _READERS[kind](io.BytesIO(data)))
        return LabelList(identity=identity, said=said, has_labels="labels" in used)
    except (csv.Error, ValueError, RecursionError, pa.ArrowException, OSError, EOFError) as error:
        raise UserError(f"--labels {location} is damaged, or not {kind}: {error}") from error


def _name(location: str) -> str:
    """Of a URL, without its query: one that is signed is another each time, and nobody else's."""
    return PurePosixPath(urlsplit(location).path if "://" in location else location).name


def identity_of(name: str, data: bytes) -> str:
    """A file in the fingerprint of what was made with it."""
    return f"{name} (sha256 {hashlib.sha256(data).hexdigest()[:16]})"


def _read(location: str) -> bytes:
    try:
        with (
            reading(f"--labels {location}"),
            open_file(location if "://" in location else Path(location)) as file,
        ):
            data: bytes = file.read()
            return data
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
    return LabelList(identity=identity_of("ImageSets/Main", digests.encode()), said=read_split_files(files))


def _csv(file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    return csv_rows(csv.reader(io.TextIOWrapper(file, "utf-8", newline=""), strict=True))


def _tsv(file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    # A quote in it is a quote.
    lines = (line.rstrip("\r\n") for line in io.TextIOWrapper(file, "utf-8", newline="\n"))
    return csv_rows(line.split("\t") for line in lines)


def _json_lines(file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    for line in io.TextIOWrapper(file, "utf-8"):
        if line.strip():
            yield _object(json.loads(line))


def _json(file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    """A list of objects; or COCO's, whose annotations have an image and a category each."""
    value = json.load(io.TextIOWrapper(file, "utf-8"))
    if isinstance(value, dict) and {"images", "annotations", "categories"} <= value.keys():
        try:
            classes = {each["id"]: each.get("name", each["id"]) for each in value["categories"]}
            images = {each["id"]: each["file_name"] for each in value["images"]}
            for each in value["annotations"]:
                yield {"file_name": images[each["image_id"]], "label": classes[each["category_id"]]}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"COCO's images, annotations and categories do not fit: {error}") from error
        return
    if not isinstance(value, list):
        raise ValueError('it is neither a list, as [{"path": …, "label": …}, …], nor of COCO\'s form')
    yield from map(_object, value)


def _object(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{json.dumps(row)[:80]} is no object with a path and labels")
    return row


def _parquet(file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    with pq.ParquetFile(pa.BufferReader(file.read())) as parquet:
        for batch in parquet.iter_batches(use_threads=False):
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[Any], Iterator[Mapping[str, Any]]]] = {
    "csv": _csv,
    "tsv": _tsv,
    "json": _json,
    "jsonl": _json_lines,
    "parquet": _parquet,
}


def _collected(location: str, rows: Iterator[Mapping[str, Any]]) -> tuple[dict[str, Said], set[str]]:
    """What the rows say, several about one image together; and what they have columns for, see `_columns`."""
    said: dict[str, Said] = {}
    known: dict[Said, Said] = {}  # a million rows say a thousand different things
    names: dict[str, None] = {}
    used: set[str] = set()
    for number, row in enumerate(rows, 1):
        names |= dict.fromkeys(row)
        columns = _columns(tuple(row))
        used |= columns.keys()
        image = _clean(row[columns["image"]]) if "image" in columns else None
        if image is None:
            continue
        image = image.removeprefix("./")  # as `find` writes paths
        new = Said(
            labels=_labels(row[columns["labels"]], columns["labels"]) if "labels" in columns else (),
            split=_clean(row[columns["split"]]) if "split" in columns else None,
            ignore=_labels(row[columns["ignore"]], "ignore") if "ignore" in columns else (),
        )
        both = joined(said[image], new) if image in said else new
        if both is None:
            raise UserError(
                f"--labels {location}, row {number}: {image} is in the split {new.split}, and before in "
                f"{said[image].split}"
            )
        said[image] = known.setdefault(both, both)
    if not names:
        raise UserError(f"--labels {location} has no rows: give a list with some")
    if "image" not in used or used == {"image"}:
        raise UserError(
            f"--labels {location} has the columns {', '.join(names)}: call that of the images "
            "path, name or key, and that of their labels `label`, or `labels` if commas part several"
        )
    return said, used


@lru_cache
def _columns(names: tuple[str, ...]) -> dict[str, str]:
    """What rows with these columns call those that are used."""
    lower = {name.strip().lower(): name for name in reversed(names)}
    wanted = {
        "image": IMAGE_NAMES,
        "labels": (*MANY_LABELS, *ONE_LABEL, "predictionstring"),
        "split": ("split", "subset", "partition"),
        "ignore": ("ignore",),
    }
    found = {
        what: next((lower[name] for name in usual if name in lower), None) for what, usual in wanted.items()
    }
    return {what: name for what, name in found.items() if name is not None}


def _labels(value: Any, column: str) -> tuple[str, ...]:
    if isinstance(value, list | tuple):
        return tuple(text for each in value if (text := _clean(each)) is not None)
    text = _clean(value)
    if text is None:
        return ()
    name = column.strip().lower()
    if name == "predictionstring":
        return tuple(dict.fromkeys(text.split()[::5]))
    return (text,) if name in ONE_LABEL else tuple(split_labels(text))


def _clean(value: Any) -> str | None:
    """A value as text, without blanks around it; None if there is nothing."""
    if value is None or value != value:  # noqa: PLR0124 -- NaN, which pandas writes for nothing
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    return str(value).encode("utf-8", "backslashreplace").decode().strip() or None


def _text_list(location: str, identity: str, text: str) -> LabelList:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    truth = _TRUTH.fullmatch(_name(location))
    if truth is not None and all(line.isdigit() for line in lines):
        names = _devkit_names(location)
        said = {
            f"{truth[1]}_val_{number:08d}": Said((names.get(line, line),))
            for number, line in enumerate(lines, 1)
        }
        return LabelList(identity=f"{identity}{_with(names)}", said=said, unnamed=not names)
    words = [line.rsplit(None, 1) for line in lines]
    wrong = next((line for line, parts in zip(lines, words, strict=True) if len(parts) != 2), None)
    if wrong is not None or not lines:
        raise UserError(
            f"--labels {location} is no list of lines `image label`"
            + ("" if wrong is None else f", as {wrong!r} has one word only")
            + ": a file of another form needs names of columns, such as path and label in a .csv"
        )
    names = _places_names(location)
    said, _ = _collected(
        location, ({"path": image, "label": names.get(label, label)} for image, label in words)
    )
    unnamed = not names and _name(location).startswith("places365")
    return LabelList(identity=f"{identity}{_with(names)}", said=said, unnamed=unnamed)


def _with(names: Mapping[str, str]) -> str:
    """Names that came from a second file, for the fingerprint."""
    if not names:
        return ""
    digest = hashlib.sha256(json.dumps(sorted(names.items())).encode()).hexdigest()
    return f", names (sha256 {digest[:16]})"


def _devkit_names(location: str) -> dict[str, str]:
    """WordNet ids by the devkit's numbers, from its meta.mat beside the file; none if it is not there."""
    path = Path(location).parent / "meta.mat"
    if "://" in location or not path.is_file():
        return {}
    from scipy.io import loadmat

    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
    except Exception as error:  # scipy raises whatever comes of damaged bytes
        raise UserError(
            f"{path} is no meta.mat of ILSVRC's devkit ({error}): restore it, or move it away"
        ) from error


def _places_names(location: str) -> dict[str, str]:
    """Names of Places' classes by their numbers, from the list of categories beside the file."""
    path = Path(location).parent / "categories_places365.txt"
    if "://" in location or not _name(location).startswith("places365") or not path.is_file():
        return {}
    pairs = [line.split() for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
    # "/b/bow_window/indoor 58": the letter is no part of the name.
    return {number: name.strip("/").partition("/")[2] for name, number in pairs}
