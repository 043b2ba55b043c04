"""What a file of labels says, row by row, as a fenced process reads it (`ingest.labels.label_list`)."""

import csv
import hashlib
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from ingest.labels.said import Said
from ingest.sources.column_values import split_labels
from ingest.sources.companions import MOST_LABELS
from ingest.sources.folder_metadata import csv_rows
from ingest.sources.json_stream import JsonStream
from ingest.sources.text_blocks import BLOCK_BYTES, encoding_of
from ingest.sources.url_list import PARQUET_BUFFER, shown

IMAGE_NAMES = (
    *("path", "file_name", "filename", "file", "image_path", "url", "name", "key", "image", "image_name"),
    *("image_id", "imageid", "id"),
)
# One label, whatever is in it; and several, between commas.
ONE_LABEL = ("label", "class", "class_name", "category", "target", "wnid")
MANY_LABELS = ("labels", "classes", "tags", "hashtags")
TRUTH = re.compile(r"(ILSVRC\d{4})_validation_ground_truth\.txt")
_NO_PAIRS = (
    "--labels {} is no list of lines `image label`{}: a file of another form needs names of columns, such as "
    "path and label in a .csv"
)
_NO_JSON = 'it is neither a list, as [{"path": …, "label": …}, …], nor of COCO\'s form'
_ROWS_AT_A_TIME = 1 << 15
# Opens a file, unpacked, from its beginning.
_Opened = Callable[[], AbstractContextManager[Any]]


def rows(
    opened: _Opened, beside: _Opened | None = None, *, location: str, name: str, kind: str
) -> Iterator[pa.Table]:
    """What the file's rows say: tables of row (from 1; empty ones count), image, and `said`, a
    number in the list that the tables before them make up. Metadata of these tell of numbers and their names.

    Args:
        opened: opens the file.
        beside: opens that with the names of its numbers.
        location: what to call it.
        name: of the file alone.
        kind: how it is written.

    Raises:
        UserError: it is none, or does not say which column is the image and which its labels.
    """
    try:
        about: dict[str, str] = {}
        if kind == "parquet":
            with opened() as file:
                yield from _tables(_said(location, _parquet(file), about), about)
            return
        with opened() as file:
            encoding = encoding_of(file.read(4))
        with opened() as file:
            # Ends of lines are as they are in csv; what has none of its own takes them out.
            text = io.TextIOWrapper(
                file, encoding, newline="\n" if kind == "tsv" else "" if kind == "csv" else None
            )
            if kind == "txt":
                yield from _tables(_text_list(location, name, text, beside, about), about)
            else:
                yield from _tables(_said(location, _READERS[kind](text), about), about)
    except MemoryError:
        raise
    except (csv.Error, ValueError, RecursionError, pa.ArrowException, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"--labels {location} is damaged, or not {kind}: {str(error)[:1_000]}") from error


def _tables(rows: Iterator[tuple[int, str, Said]], about: Mapping[str, str]) -> Iterator[pa.Table]:
    known: dict[Said, int] = {}  # a million rows say a thousand different things
    batch: list[tuple[int, str, int]] = []
    new: list[Said] = []
    for number, image, said in rows:
        if said not in known:
            known[said] = len(known)
            new.append(said)
        batch.append((number, image, known[said]))
        if len(batch) == _ROWS_AT_A_TIME:
            yield from _two_tables(new, batch, about)
            batch, new = [], []
    yield from _two_tables(new, batch, about)


def _two_tables(
    new: list[Said], batch: list[tuple[int, str, int]], about: Mapping[str, str]
) -> Iterator[pa.Table]:
    texts = pa.list_(pa.string())
    yield pa.table(
        {
            "labels": pa.array([each.labels for each in new], texts),
            "split": pa.array([each.split for each in new], pa.string()),
            "ignore": pa.array([each.ignore for each in new], texts),
        }
    ).replace_schema_metadata(about)
    numbers, images, said = zip(*batch, strict=True) if batch else ((), (), ())
    yield pa.table(
        {
            "row": pa.array(numbers, pa.int64()),
            "image": pa.array(images, pa.string()),
            "said": pa.array(said, pa.int64()),
        }
    )


def _csv(text: TextIO) -> Iterator[Mapping[str, Any]]:
    return csv_rows(csv.reader(text, strict=True))


def _tsv(text: TextIO) -> Iterator[Mapping[str, Any]]:
    # A quote in it is a quote.
    return csv_rows(line.rstrip("\r\n").split("\t") for line in text)


def _json_lines(text: TextIO) -> Iterator[Mapping[str, Any]]:
    for line in text:
        yield _object(json.loads(line)) if line.strip() else {}


def _json(text: TextIO) -> Iterator[Mapping[str, Any]]:
    """A list of objects; or COCO's, whose annotations have an image and a category each."""
    stream = JsonStream(iter(partial(text.read, BLOCK_BYTES), ""))
    if stream.next_character() == "{":
        try:
            yield from _coco(stream)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"COCO's images, annotations and categories do not fit: {error}") from error
        return
    if stream.next_character() != "[":
        raise ValueError(_NO_JSON)
    yield from map(_object, stream.items())


def _coco(stream: JsonStream) -> Iterator[Mapping[str, Any]]:
    """What is of use of each item: outlines of objects take hundreds of megabytes."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for name in stream.members():
        items = stream.items() if stream.next_character() == "[" else iter([stream.value()])
        match name:
            case "images":
                found[name] = [(each["id"], each["file_name"]) for each in items]
            case "categories":
                found[name] = [(each["id"], each.get("name", each["id"])) for each in items]
            case "annotations":
                found[name] = [(each["image_id"], each["category_id"]) for each in items]
            case _:
                deque(items, maxlen=0)
    if len(found) < 3:
        raise ValueError(_NO_JSON)
    images, classes = dict(found["images"]), dict(found["categories"])
    for image, category in found["annotations"]:
        yield {"file_name": images[image], "label": classes[category]}


def _object(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{json.dumps(row)[:80]} is no object with a path and labels")
    return row


def _parquet(file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    with pq.ParquetFile(file, buffer_size=PARQUET_BUFFER) as parquet:
        for batch in parquet.iter_batches(use_threads=False):
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[TextIO], Iterator[Mapping[str, Any]]]] = {
    "csv": _csv,
    "tsv": _tsv,
    "json": _json,
    "jsonl": _json_lines,
}


def _said(
    location: str, rows: Iterator[Mapping[str, Any]], about: dict[str, str]
) -> Iterator[tuple[int, str, Said]]:
    """What each row says; in the end, `about` has whether there were no labels among it."""
    names: dict[str, None] = {}
    used: set[str] = set()
    for number, row in enumerate(rows, 1):
        names |= dict.fromkeys(row)
        columns = _columns(tuple(row))
        used |= columns.keys()
        image = _clean(row[columns["image"]]) if "image" in columns else None
        if image is not None:
            labels = _labels(row[columns["labels"]], columns["labels"]) if "labels" in columns else ()
            split = _clean(row[columns["split"]]) if "split" in columns else None
            ignore = _labels(row[columns["ignore"]], "ignore") if "ignore" in columns else ()
            yield number, image, Said(labels[: MOST_LABELS + 1], split, ignore[: MOST_LABELS + 1])
    if not names:
        raise UserError(f"--labels {location} has no rows: give a list with some")
    if "image" not in used or used == {"image"}:
        raise UserError(
            f"--labels {location} has the columns {shown(list(names))}: call that of the images "
            "path, name or key, and that of their labels `label`, or `labels` if commas part several"
        )
    if "labels" not in used:
        about["no_labels"] = "yes"


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


def _text_list(
    location: str, name: str, text: TextIO, beside: _Opened | None, about: dict[str, str]
) -> Iterator[tuple[int, str, Said]]:
    """The rows; `about` has what is to be said of their numbers."""
    lines: Iterable[str] = map(str.strip, text)
    truth = TRUTH.fullmatch(name)
    if truth is not None:
        lines = list(filter(None, lines))
        if all(map(str.isdigit, lines)):
            names = _devkit_names(location, beside)
            about |= _about(names, unnamed=not names)
            for number, line in enumerate(lines, 1):
                yield number, f"{truth[1]}_val_{number:08d}", Said((names.get(line, line),))
            return
        beside = None
    names = _places_names(location, beside)
    about |= _about(names, unnamed=not names and name.startswith("places365"))
    yield from _named_lines(location, lines, names)


def _named_lines(
    location: str, lines: Iterable[str], names: Mapping[str, str]
) -> Iterator[tuple[int, str, Said]]:
    found = False
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        found, words = True, line.rsplit(None, 1)
        if len(words) != 2:
            raise UserError(_NO_PAIRS.format(location, f", as {shown([line])!r} has one word only"))
        yield number, words[0], Said((names.get(words[1], words[1]),))
    if not found:
        raise UserError(_NO_PAIRS.format(location, ""))


def _about(names: Mapping[str, str], *, unnamed: bool) -> dict[str, str]:
    """Names that came from a second file, for the fingerprint; and whether there should be some."""
    digest = hashlib.sha256(json.dumps(sorted(names.items())).encode()).hexdigest()
    return {
        "names": f", names (sha256 {digest[:16]})" if names else "",
        "unnamed": "yes" if unnamed else "",
    }


def _devkit_names(location: str, beside: _Opened | None) -> dict[str, str]:
    """WordNet ids by the devkit's numbers, from its meta.mat; none if it is not there."""
    if beside is None:
        return {}
    from scipy.io import loadmat

    try:
        with beside() as file:
            synsets = loadmat(file, squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
    except MemoryError:
        raise
    except Exception as error:  # scipy raises whatever comes of damaged bytes
        raise UserError(
            f"the meta.mat beside {location} is not that of ILSVRC's devkit ({str(error)[:1_000]}): restore "
            "it, or move it away"
        ) from error


def _places_names(location: str, beside: _Opened | None) -> dict[str, str]:
    """Names of Places' classes by their numbers, from the list of categories."""
    if beside is None:
        return {}
    with beside() as file:
        text = file.read().decode("utf-8", "replace")
    pairs = [line.split() for line in text.splitlines() if line.strip()]
    for words in pairs:
        if len(words) != 2:
            raise UserError(
                f"the categories_places365.txt beside {location} has a line that is no name and number, "
                f"{shown([' '.join(words)])!r}: restore it, or move it away"
            )
    # "/b/bow_window/indoor 58": the letter is no part of the name.
    return {number: name.strip("/").partition("/")[2] for name, number in pairs}
