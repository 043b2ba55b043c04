"""A bounded folder of one user on one node, for what its processes share and can make again at any time."""

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cluster.errors import UserError

if TYPE_CHECKING:
    from pipeline.recipe.pretrain import Run

_DEFAULT_BYTES = 8 << 30
# Between two looks at the folder each process writes this part of what may be there: looking at thousands of
# files takes as long as making ten.
_LOOK_EVERY = 1 / 128
# A file that was being written so long ago was left by a kill.
_ABANDONED_SECONDS = 3_600


@dataclass(frozen=True, kw_only=True)
class CachePlace:
    """Where caches lie, and how much each may hold.

    Attributes:
        folder: on the node's own disk, in which a private folder is made; None for the folder for temporary
            files, and for memory where much is read ahead.
        limit: bytes, about: processes look only now and then. Never more than half of what is free.
    """

    folder: Path | None = None
    limit: int = _DEFAULT_BYTES

    @classmethod
    def of(cls, run: "Run") -> Self:
        """What a recipe says."""
        folder = None if run.cache is None else Path(run.cache)
        return cls(folder=folder, limit=int(run.cache_gib * 2**30))


def private_folder(parent: Path, kind: str) -> Path:
    """A folder in `parent` that is nobody else's, made unless it is there.

    Raises:
        UserError: it belongs to another user, or others may write to it.
        OSError: it cannot be made.
    """
    private = private_name(parent)
    for folder in (private, private / kind):
        folder.mkdir(mode=0o700, parents=folder == private, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise UserError(
                f"{folder} belongs to another user, or others may write to it: remove it, or set TMPDIR to a "
                "folder of your own, and run.cache too"
            )
    return private / kind


def private_name(parent: Path) -> Path:
    """The name of this user's folder in `parent`."""
    return parent / f"seer-pipeline-{os.geteuid()}"


class NodeCache:
    """Files by name in `place`, each there whole or not at all; those that were used longest ago go first.

    Args:
        kind: of these files; others are not looked at.

    Raises:
        UserError: the private folder belongs to another user, or others may write to it.
        OSError: it cannot be made.
    """

    def __init__(self, place: CachePlace, kind: str) -> None:
        folder = private_folder(place.folder or Path(tempfile.gettempdir()), kind)
        self._folder, self._limit = folder, place.limit
        self._unseen = 0.0  # bytes that may be written before the next look

    def path(self, name: str) -> Path:
        """Where the file of this name is, if it is there."""
        return self._folder / name

    def touch(self, name: str) -> bool:
        """Count as used now; False if the file is not there, or nothing can be changed."""
        try:
            os.utime(self.path(name))
        except OSError:
            return False
        return True

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Publish a file under this name, in place of what was there.

        Raises:
            OSError: no room, or no permission.
        """
        size = sum(map(len, parts))
        self._unseen -= size
        if self._unseen < 0:
            self._unseen = self._make_room(size) * _LOOK_EVERY
        draft = self.path(f".{name}-{secrets.token_hex(8)}")
        try:
            with draft.open("xb") as file:
                file.writelines(parts)
            draft.replace(self.path(name))
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    def _make_room(self, size: int) -> int:
        """Remove what was used longest ago, until there is room for `size` and what comes meanwhile.

        Returns:
            How many bytes may be there.
        """
        files: list[tuple[float, int, Path]] = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # others remove, too
                status = entry.stat(follow_symlinks=False)
                is_draft = entry.name.startswith(".")
                if not is_draft or status.st_mtime < time.time() - _ABANDONED_SECONDS:
                    files.append((0 if is_draft else status.st_mtime, status.st_size, Path(entry.path)))
        held = sum(of_file for _, of_file, _ in files)
        most = min(self._limit, (held + shutil.disk_usage(self._folder).free) // 2)
        for used, of_file, path in sorted(files):
            if used and held + size <= most * (1 - 2 * _LOOK_EVERY):
                break
            path.unlink(missing_ok=True)
            held -= of_file
        return most
