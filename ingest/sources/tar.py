"""A tar, plain or compressed by gzip, bzip2, xz or Zstandard: its files, in the order of the archive.

A member that is a plain tar itself, as ImageNet's are, stands for its own members: they lie in it as in a
folder called like it without `.tar`, which is their label. That goes one level deep. A link to a member
before it has that member's data. Archives that follow each other in one file, as `cat` puts them, are one.

What `ingest.sources.companions` knows as companions of an image goes into the image's row.

Headers are read here and not by `tarfile.TarFile`, which keeps every member in memory, reads extended headers
of any size, and takes a damaged header for the end of the archive. Nothing is ever extracted: a member's name
is a label.
"""

import bz2
import gzip
import io
import lzma
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Self

from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.problem import PROBLEMS, Problem
from ingest.sources.companions import COLUMNS, LARGEST_COMPANION, Member, joined, member_of
from ingest.sources.source import Item, first_folder
from ingest.sources.zstd_file import open_zstd
from ingest.store.files import open_file

_BLOCK = 512
_PIECE = 1 << 20
# Long names and PAX records; real ones are a few hundred bytes.
_LARGEST_EXTENSION = 1 << 20
# No system takes names of more than 4096 bytes.
_LONGEST_NAME = 1 << 16
# A tar of images hardly shrinks: one that unpacks to more than this is a bomb.
_LARGEST_EXPANSION = 100
_EXPANSION_FREE = 1 << 30
# Members that later links may name; links to those before them, too far back, are told of.
_MEMBERS_KNOWN = 1 << 18
# Headers about the next member. Global headers are of no use here, and skipped.
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
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


class TarSource:
    """Images in a tar, a local one or one in a bucket; see the module's docstring."""

    kind = SourceKind.TAR
    extra = COLUMNS

    def __init__(self, place: Path | str) -> None:
        self.name = os.fsencode(PurePath(place).name).decode("utf-8", "backslashreplace")
        self._place = place
        self._unpacked: _Unpacked | None = None

    def describe(self) -> SourceRecord:
        with open_file(self._place) as file:
            return SourceRecord(kind=self.kind, name=self.name, bytes=file.seek(0, os.SEEK_END))

    def shard(self) -> None:
        """Its images are copied."""

    def items(self) -> Iterator[Item]:
        """Regular members without hidden names. A damaged archive ends in an item that says so."""
        with _Unpacked(self._place) as unpacked:
            yield from joined(_listed(unpacked))

    def read(self, items: Iterable[Item], *, max_bytes: int) -> Iterator[bytes | Problem]:
        for item in items:
            if item.problem:
                yield PROBLEMS[item.problem]
            elif item.size > max_bytes:
                yield PROBLEMS["too_many_bytes"]
            else:
                yield self._bytes(item)

    def _bytes(self, item: Item) -> bytes | Problem:
        try:
            # Kept open from unit to unit: a compressed archive is unpacked once, not once per unit.
            if self._unpacked is None:
                self._unpacked = _Unpacked(self._place)
            return self._unpacked.exactly(item.offset, item.size)
        except TarError as error:
            self.close()
            return PROBLEMS[error.problem]
        except OSError:  # it cannot even be opened
            return PROBLEMS["io_error"]

    def close(self) -> None:
        if self._unpacked is not None:
            self._unpacked.close()
            self._unpacked = None


class _Unpacked:
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


@dataclass(frozen=True, kw_only=True)
class _Extension:
    """What extended headers say of the next member, instead of its own header."""

    path: bytes = b""
    link: bytes = b""
    size: int | None = None


def is_tar(place: Path | str) -> bool:
    """Whether this is an archive that can be read from its first block on."""
    with _Unpacked(place) as unpacked:
        try:
            block = unpacked.exactly(0, _BLOCK)
            return not block.strip(b"\0") or bool(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"))
        except (TarError, tarfile.HeaderError):
            return False


def is_compressed(place: Path | str) -> bool:
    """Whether members cannot be read at their offsets."""
    with open_file(place) as file:
        return _decompressor(file) is not None


def _decompressor(file: io.BufferedIOBase) -> Callable[[Any], Any] | None:
    magic = file.read(6)
    return next((opener for start, opener in _DECOMPRESSORS.items() if magic.startswith(start)), None)


def _listed(archive: _Unpacked) -> Iterator[Member]:
    """The members without hidden names, and at once what companions say: going back would be slow."""

    def beginning(item: Item) -> bytes | None:
        try:
            return archive.exactly(item.offset, min(item.size, LARGEST_COMPANION))
        except TarError:
            return None  # its row will say so

    try:
        for item in _members(archive):
            if not any(part.startswith(b".") for part in item.path.split(b"/")):
                yield member_of(item, beginning)
    except TarError as error:
        yield member_of(Item(b"", problem=error.problem), beginning)


def _members(archive: _Unpacked) -> Iterator[Item]:
    """The regular files of an archive, and those of the tars in it."""
    for item in _files(archive, 0):
        if item.problem or not item.path.lower().endswith(b".tar") or not _begins_a_tar(archive, item):
            yield item
            continue
        folder, count = item.path[: -len(b".tar")], 0
        try:
            for inner in _files(_Window(archive, item.offset + item.size), item.offset):
                path, labels = folder + b"/" + inner.path, first_folder(folder.rpartition(b"/")[2] + b"/")
                if not inner.path:  # a damaged place
                    path, labels = item.path, item.labels
                elif b"/" in inner.path:
                    labels = first_folder(path)
                yield replace(inner, path=path, labels=labels)
                count += 1
        except TarError as error:
            # What follows the member can be read all the same, if there is more.
            yield Item(item.path, problem=error.problem, labels=first_folder(item.path))
        else:
            if not count:
                yield item


def _begins_a_tar(archive: _Unpacked, item: Item) -> bool:
    try:
        tarfile.TarInfo.frombuf(
            archive.at_most(item.offset, min(item.size, _BLOCK)), "utf-8", "surrogateescape"
        )
    except (tarfile.HeaderError, TarError):
        return False
    return True


class _Window:
    """The bytes of an archive up to an offset: those of a tar in it."""

    def __init__(self, archive: _Unpacked, end: int) -> None:
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


def _files(archive: _Unpacked | _Window, at: int) -> Iterator[Item]:
    """The files of a USTAR, PAX, GNU or V7 archive; names without ".", ".." and a first slash.

    Behind a damaged header, the next one that is sound goes on.
    """
    extension = _Extension()
    known: dict[bytes, Item] = {}
    start = at
    while archive.at_most(at, 1):
        header = archive.exactly(at, _BLOCK)
        if not header.strip(b"\0"):
            at = _behind_zeros(archive, at)
            extension = _Extension()
            continue
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            yield Item(b"", offset=at, problem="tar_damaged")
            extension, at = _Extension(), _next_header(archive, at + _BLOCK)
            continue
        # Base-256 sizes go to 95 bits; files, and the plan's columns, end before 64.
        if not 0 <= info.size < 1 << 63:
            raise TarError("tar_damaged")
        at += _BLOCK
        archive.refuse_beyond(at + info.size)
        if info.type in _EXTENSIONS:
            extension = _extended(extension, info, archive, at)
            at += _padded(info.size)
            continue
        if max(len(extension.path), len(extension.link)) > _LONGEST_NAME:
            raise TarError("tar_damaged")
        size = info.size if extension.size is None else extension.size
        path = _clean(extension.path or info.name.encode("utf-8", "surrogateescape"))
        link = extension.link or info.linkname.encode("utf-8", "surrogateescape")
        extension = _Extension()
        archive.refuse_beyond(at + size * info.isreg())
        if info.type == tarfile.GNUTYPE_SPARSE:
            at = _after_sparse_map(archive, header, at)
        if info.issym() or info.islnk():
            item = _linked(path, known.get(_target(info, path, link)), archive)
        else:
            item = Item(path, offset=at, size=size, problem=_problem(info), labels=first_folder(path))
        if not info.isdir():
            _remember(known, item)
            yield item
        # As tarfile does: links, folders and devices have no data whatever their size field says.
        if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES:
            at += _padded(size)
    # Many writers leave out the end mark; but the last member must be there to its last byte.
    archive.exactly(max(at - 1, start), min(at - start, 1))


def _problem(info: tarfile.TarInfo) -> str:
    """Why a member that is no link has no data."""
    if info.type == tarfile.GNUTYPE_SPARSE:
        return "sparse_member"
    return "" if info.isreg() else "not_a_file"


def _linked(path: bytes, target: Item | None, archive: _Unpacked | _Window) -> Item:
    """The item of a link: with the data of the member that it names, if that is before it."""
    labels = first_folder(path)
    if target is None:
        return Item(path, problem="link_unresolved", labels=labels)
    # To go back in a compressed archive is to unpack it once more, for every link.
    problem = target.problem or ("link_compressed" if archive.is_compressed else "")
    return Item(path, offset=target.offset, size=target.size, problem=problem, labels=labels)


def _target(info: tarfile.TarInfo, path: bytes, link: bytes) -> bytes:
    """What a link names, as a member's path: symbolic ones from their folder, hard ones from the root."""
    folder = path.rpartition(b"/")[0] if info.issym() else b""
    return _clean(posixpath.normpath(posixpath.join(folder, link)))


def _remember(known: dict[bytes, Item], item: Item) -> None:
    known[item.path] = item
    if len(known) > _MEMBERS_KNOWN:
        del known[next(iter(known))]


def _behind_zeros(archive: _Unpacked | _Window, at: int) -> int:
    """Where, from `at` on, a block begins that is not all zeros, or the end: most archives end in zeros."""
    while piece := archive.at_most(at, _PIECE):
        if rest := piece.lstrip(b"\0"):
            return at + (len(piece) - len(rest)) // _BLOCK * _BLOCK
        at += len(piece)
    return at


def _next_header(archive: _Unpacked | _Window, at: int) -> int:
    """Where, from `at` on, the next sound header begins, or the end."""
    while block := archive.at_most(at, _BLOCK):
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            at += len(block)
        else:
            return at
    return at


def _extended(
    extension: _Extension, info: tarfile.TarInfo, archive: _Unpacked | _Window, at: int
) -> _Extension:
    """What is known of the next member after one more extended header."""
    if info.type == tarfile.XGLTYPE:
        return extension
    if info.size > _LARGEST_EXTENSION:
        raise TarError("tar_damaged")
    body = archive.exactly(at, info.size)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return replace(extension, path=body.partition(b"\0")[0])
    if info.type == tarfile.GNUTYPE_LONGLINK:
        return replace(extension, link=body.partition(b"\0")[0])
    records = _pax_records(body)
    size = _number(records[b"size"]) if b"size" in records else extension.size
    link = records.get(b"linkpath", extension.link)
    return _Extension(path=records.get(b"path", extension.path), link=link, size=size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise TarError("tar_damaged")
    return int(text)


def _pax_records(body: bytes) -> dict[bytes, bytes]:
    """Records of the form "length key=value\\n"."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(body) and body[at] != 0:
        space = body.find(b" ", at, at + 20)
        if space < 0:
            raise TarError("tar_damaged")
        end = at + _number(body[at:space])
        if end <= space or end > len(body):
            raise TarError("tar_damaged")
        key, _, value = body[space + 1 : end - 1].partition(b"=")
        records[key] = value
        at = end
    return records


def _after_sparse_map(archive: _Unpacked | _Window, header: bytes, at: int) -> int:
    """Where the data of an old GNU sparse member begins: behind the blocks that continue its map."""
    more = header[482]
    while more:
        block = archive.exactly(at, _BLOCK)
        more = block[504]
        at += _BLOCK
    return at


def _clean(name: bytes) -> bytes:
    return b"/".join(part for part in name.split(b"/") if part not in (b"", b".", b".."))
