"""Single files by path or URL: here, in a bucket, or wherever else fsspec looks."""

import io
import re
from pathlib import Path

import fsspec
from fsspec.utils import glob_translate

from ingest.store.clients import is_bucket
from ingest.store.open import open_store


def open_file(place: Path | str) -> io.BufferedIOBase:
    """A local file, an object in a bucket, or what is behind a URL that fsspec opens, to read and seek in.

    Raises:
        UserError: a bucket is not there, or credentials are missing.
        OSError, ImportError, ValueError: it cannot be opened.
    """
    if isinstance(place, Path):
        return place.open("rb")
    if is_bucket(place):
        folder, _, name = place.rpartition("/")
        return open_store(folder).open(name)
    file: io.BufferedIOBase = fsspec.open(place, "rb").open()
    return file


def matching(pattern: str) -> list[str]:
    """Files whose path or URL matches a pattern with `*`, sorted."""
    if not is_bucket(pattern):
        system, path = fsspec.core.url_to_fs(pattern)
        found = (system.unstrip_protocol(name) for name in system.glob(path))
        return sorted(name.removeprefix("file://") for name in found)
    matches = re.compile(glob_translate(pattern)).match
    folder = pattern.partition("*")[0].rpartition("/")[0]
    store = open_store(folder)
    return [url for url in (f"{folder}/{entry.name}" for entry in store.list("")) if matches(url)]
