"""The bytes of an archive by offset, plain or compressed by gzip, bzip2, xz or Zstandard, within bounds."""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ingest.sources.zstd_file import open_zstd
from ingest.store.files import open_file

# A tar of images hardly shrinks: one that unpacks to more than this is a bomb.
_LARGEST_EXPANSION = 100
_EXPANSION_FREE = 1 << 30
_DECOMPRESSORS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": open_zstd,
}


class TarError(Exception):
    """The archive cannot be read on from here; `problem` is a key of PROBLEMS."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class Unpacked:
    """The archive's bytes by offset. Going back in a compressed archive is correct, and slow."""

    def __init__(self, place: Path | str) -> None:
        self._packed = open_file(place)
        opener = _decompressor(self._packed)
        self._end = _EXPANSION_FREE + _LARGEST_EXPANSION * self._packed.seek(0, os.SEEK_END)
        self._packed.seek(0)
        self._file: io.BufferedIOBase = self._packed if opener is None else opener(self._packed)
        self.is_compressed = opener is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def at_most(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer at the end of the archive."""
        if offset + size > self._end:
            raise TarError("tar_bomb")
        try:
            self._file.seek(offset)
            return self._file.read(size)
        except EOFError:
            raise TarError("tar_truncated") from None
        except OSError as error:
            # The decompressors, too, raise OSError: then it carries no number.
            raise TarError("tar_damaged" if error.errno is None else "io_error") from error
        except (zlib.error, lzma.LZMAError) as error:
            raise TarError("tar_damaged") from error

    def refuse_beyond(self, stop: int) -> None:
        """Whether it is there, shows when it is read."""

    def exactly(self, offset: int, size: int) -> bytes:
        data = self.at_most(offset, size)
        if len(data) < size:
            raise TarError("tar_truncated")
        return data

    def close(self) -> None:
        self._file.close()
        self._packed.close()


class Window:
    """The bytes of an archive up to an offset: those of a tar in it."""

    def __init__(self, archive: Unpacked, end: int) -> None:
        self._archive = archive
        self._end = end
        self.is_compressed = archive.is_compressed

    def at_most(self, offset: int, size: int) -> bytes:
        return self._archive.at_most(offset, max(0, min(size, self._end - offset)))

    def refuse_beyond(self, stop: int) -> None:
        """What a tar in a tar claims of the bytes behind it is not its own."""
        if stop > self._end:
            raise TarError("tar_truncated")

    def exactly(self, offset: int, size: int) -> bytes:
        self.refuse_beyond(offset + size)
        return self._archive.exactly(offset, size)


def is_compressed(place: Path | str) -> bool:
    """Whether members cannot be read at their offsets."""
    with open_file(place) as file:
        return _decompressor(file) is not None


def _decompressor(file: io.BufferedIOBase) -> Callable[[Any], Any] | None:
    magic = file.read(6)
    return next((opener for start, opener in _DECOMPRESSORS.items() if magic.startswith(start)), None)
