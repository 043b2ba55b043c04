"""The files in a tar, by its headers alone: USTAR, PAX, GNU or V7, one after the other.

Headers are read here and not by `tarfile.TarFile`, which keeps every member in memory, reads extended headers
of any size, and takes a damaged header for the end of the archive.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ingest.sources.source import Item, first_folder
from ingest.sources.tar_bytes import TarError, Unpacked, Window

BLOCK = 512
_PIECE = 1 << 20
# Long names and PAX records; real ones are a few hundred bytes.
_LARGEST_EXTENSION = 1 << 20
# No system takes names of more than 4096 bytes.
_LONGEST_NAME = 1 << 16
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


@dataclass(frozen=True, kw_only=True)
class _Extension:
    """What extended headers say of the next member, instead of its own header."""

    path: bytes = b""
    link: bytes = b""
    size: int | None = None


def read_header(block: bytes) -> tarfile.TarInfo | None:
    """What a block says of a member; None if it is no sound header."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def files(archive: Unpacked | Window, at: int) -> Iterator[Item]:
    """The files of an archive that begins at this offset; names without ".", ".." and a first slash.

    Behind a damaged header, the next one that is sound goes on.

    Raises:
        TarError: it cannot be read on from there.
    """
    extension = _Extension()
    known: dict[bytes, Item] = {}
    start = at
    while archive.at_most(at, 1):
        header = archive.exactly(at, BLOCK)
        if not header.strip(b"\0"):
            at = _behind_zeros(archive, at)
            extension = _Extension()
            continue
        info = read_header(header)
        if info is None:
            yield Item(b"", offset=at, problem="tar_damaged")
            extension, at = _Extension(), _next_header(archive, at + BLOCK)
            continue
        # Base-256 sizes go to 95 bits; files, and the plan's columns, end before 64.
        if not 0 <= info.size < 1 << 63:
            raise TarError("tar_damaged")
        at += BLOCK
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


def _linked(path: bytes, target: Item | None, archive: Unpacked | Window) -> Item:
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


def _behind_zeros(archive: Unpacked | Window, at: int) -> int:
    """Where, from `at` on, a block begins that is not all zeros, or the end: most archives end in zeros."""
    while piece := archive.at_most(at, _PIECE):
        if rest := piece.lstrip(b"\0"):
            return at + (len(piece) - len(rest)) // BLOCK * BLOCK
        at += len(piece)
    return at


def _next_header(archive: Unpacked | Window, at: int) -> int:
    """Where, from `at` on, the next sound header begins, or the end."""
    while block := archive.at_most(at, BLOCK):
        if read_header(block) is not None:
            return at
        at += len(block)
    return at


def _extended(
    extension: _Extension, info: tarfile.TarInfo, archive: Unpacked | Window, at: int
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
    return -(-size // BLOCK) * BLOCK


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


def _after_sparse_map(archive: Unpacked | Window, header: bytes, at: int) -> int:
    """Where the data of an old GNU sparse member begins: behind the blocks that continue its map."""
    more = header[482]
    while more:
        block = archive.exactly(at, BLOCK)
        more = block[504]
        at += BLOCK
    return at


def _clean(name: bytes) -> bytes:
    return b"/".join(part for part in name.split(b"/") if part not in (b"", b".", b".."))
