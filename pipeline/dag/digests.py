"""What files hold, as digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from cluster.errors import UserError


def content_digest(path: Path, known: Mapping[Path, str] = MappingProxyType({})) -> str:
    """sha256 of a file; of a folder, of its files' names and digests.

    Args:
        known: digests of files that somebody vouches for; these are not read.
    """
    if path in known:
        return known[path]
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise FileNotFoundError(f"a stage promised {path} and did not write it")
    lines = [
        f"{file.relative_to(path).as_posix()} {content_digest(file, known)}\n"
        for file in sorted(path.rglob("*"))
        if file.is_file()
    ]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def folder_identity(folder: Path) -> str:
    """A digest of what a user's folder (or file) holds, by names, sizes and modification times.

    Reading every picture to be sure would cost more than working again after a `touch`.

    Raises:
        UserError: if there is nothing at the path.
    """
    if not folder.exists():
        raise UserError(f"{folder} does not exist; give a folder of pictures that does")
    digest = hashlib.sha256()
    for name in list_files(folder) if folder.is_dir() else [""]:
        status = (folder / name).stat()
        digest.update(os.fsencode(name) + f"\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def list_files(folder: Path) -> list[str]:
    """Relative names of the regular files under a folder, sorted; links and hidden ones are left out.

    Raises:
        UserError: if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that exists")
    names = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            path = Path(place) / file
            if not file.startswith(".") and path.is_file() and not path.is_symlink():
                names.append(path.relative_to(folder).as_posix())
    return sorted(names)
