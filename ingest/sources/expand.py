"""From what a user names to places of sources: patterns, and folders of lists, as Spark writes them."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit
from urllib.request import url2pathname

from cluster.errors import UserError
from ingest.sources.remote_trouble import reading
from ingest.sources.url_list import list_format
from ingest.store.files import matching

# What lies beside lists and is none.
_BESIDE = frozenset([".md", ".yaml", ".yml", ".py", ".crc", ".lock"])
_DESCRIPTIONS = frozenset(["json", "txt"])


def expand(location: str) -> list[str]:
    """The files that a pattern with * names, or that a folder of lists holds, in order of their names.

    Any other location is itself, a file:// URL as a path. What lies elsewhere is a folder if a slash ends it.

    Raises:
        UserError: it is empty or no URL, nothing matches, or a folder holds lists of several kinds.
    """
    if not location:  # a shell's variable without a value: it would be the current folder
        raise UserError("the name of a source is empty: say which it is")
    refuse_malformed(location)
    if location.startswith("file://"):
        location = url2pathname(urlsplit(location).path)
    if "*" in location:
        with reading(location):
            found = matching(location)
        if not found:
            raise UserError(f"no file matches {location}")
        return found
    if "://" not in location:
        return _local_lists(location) if Path(location).is_dir() else [location]
    if not location.endswith("/"):
        return [location]
    with reading(location):
        below = matching(f"{location}**")
    return _lists(location, iter(below))


def refuse_malformed(location: str) -> None:
    """What is meant as a URL is one.

    Raises:
        UserError: it is not.
    """
    try:
        urlsplit(location if "://" in location else "")
    except ValueError as error:
        raise UserError(f"{location} is no URL ({error}): check how it is spelled") from error


def _local_lists(folder: str) -> list[str]:
    unreadable: list[OSError] = []
    found = _lists(folder, _files_below(folder, unreadable))
    # Below a folder of images, one that cannot be read is a row; lists have no such place.
    if found != [folder] and unreadable:
        raise UserError(
            f"{unreadable[0].filename} cannot be read, and may hold lists, as {folder} does: make it "
            "readable, or name the lists to read"
        )
    return found


def _files_below(folder: str, unreadable: list[OSError]) -> Iterator[str]:
    for place, folders, files in os.walk(folder, onerror=unreadable.append):
        folders.sort()
        yield from (f"{place}/{name}" for name in sorted(files))


def _lists(folder: str, files: Iterator[str]) -> list[str]:
    """The lists of a folder that holds nothing else; or the folder itself, which is one of images."""
    found: dict[str, list[str]] = {}
    for file in files:
        parts = PurePosixPath(file.removeprefix(folder)).parts
        if any(part.startswith((".", "_")) for part in parts) or PurePosixPath(file).suffix in _BESIDE:
            continue
        if PurePosixPath(file).name in ("README", "LICENSE"):
            continue
        kind = list_format(file)
        if kind is None:
            return [folder]
        found.setdefault(kind[0], []).append(file)
    kinds = sorted(found)
    if len(kinds) > 1:  # a text or JSON beside them describes them
        kinds = [kind for kind in kinds if kind not in _DESCRIPTIONS] or kinds
    if not kinds:
        return [folder]
    if len(kinds) > 1:
        raise UserError(
            f"{folder} holds lists of several kinds, {' and '.join(kinds)}: name those to read, such as "
            f"'{folder}/*.{kinds[0]}'"
        )
    return found[kinds[0]]
