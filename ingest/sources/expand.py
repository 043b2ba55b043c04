"""From what a user names to places of sources: patterns, and folders of lists, as Spark writes them."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from cluster.errors import UserError
from ingest.sources.remote_trouble import reading
from ingest.sources.url_list import list_format
from ingest.store.files import matching

# What lies beside lists and is none.
_BESIDE = frozenset([".md", ".yaml", ".yml", ".py", ".crc", ".lock"])
_DESCRIPTIONS = frozenset(["json", "txt"])


def expand(location: str) -> list[str]:
    """The files that a pattern with * names, or that a folder of lists holds, in order of their names.

    Any other location is itself. What lies elsewhere is a folder if a slash ends it.

    Raises:
        UserError: nothing matches, or a folder holds lists of several kinds.
    """
    if "*" in location:
        with reading(location):
            found = matching(location)
        if not found:
            raise UserError(f"no file matches {location}")
        return found
    if "://" not in location:
        return _lists(location, _files_below(location)) if Path(location).is_dir() else [location]
    if not location.endswith("/"):
        return [location]
    with reading(location):
        below = matching(f"{location}**")
    return _lists(location, iter(below))


def _files_below(folder: str) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
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
