"""From what a user names to a source of images."""

import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from yarl import URL

from cluster.errors import UserError
from ingest.dataset.plan_record import SourceKind, SourceRecord
from ingest.image.header import sniff
from ingest.sources.file_list import FileList, ListedFiles, names_files
from ingest.sources.folder import FolderSource
from ingest.sources.image_listing import ImageListing
from ingest.sources.image_table import ImageTable, image_column
from ingest.sources.remote_trouble import is_trouble
from ingest.sources.source import Images, Listing, Source
from ingest.sources.tar import TarSource, is_tar
from ingest.sources.tar_in_place import ForeignTar
from ingest.sources.url_list import Columns, list_format
from ingest.sources.url_listing import UrlListing
from ingest.sources.warc import WarcSource, is_warc
from ingest.store.clients import is_bucket
from ingest.store.files import open_file
from ingest.video.container import sniff_container
from ingest.web.opt_outs import ALL, OptOut

# Enough to tell an image by.
_BEGINNING = 4096
_WITH_COLUMNS = ("csv", "tsv", "json", "jsonl", "parquet")


def open_listing(
    text: str, columns: Columns, *, heeded: frozenset[OptOut] = ALL, follow_links: bool = False
) -> Listing:
    """What `open_images` opens, a table of images, or a list of URLs or of files, to be planned.

    Args:
        text: what a user names.
        columns: of a list.
        heeded: ways to opt out that are obeyed of the answers that an archive stores.
        follow_links: of a folder, those that lead out of it, and to folders.

    Raises:
        UserError: it is none of them.
    """
    if not is_list(text):
        return ImageListing(open_images(text, heeded=heeded, follow_links=follow_links))
    if list_format(text) == ("parquet", None) and (image := image_column(text, columns.url)) is not None:
        _refuse_unreadable_later(text)
        return ImageListing(ImageTable(text, image, columns))
    listed = UrlListing(text, columns)
    return FileList(listed) if names_files(text, listed) else listed


def written_down(place: str) -> str:
    """Where a source is, as plans have it: without a name and a password, and without a signed query."""
    if place.startswith(("http://", "https://")):
        return str(URL(place).with_user(None).with_query(None))
    return place if "://" in place else str(Path(place).resolve())


def _refuse_unreadable_later(table: str) -> None:
    """The images of a table are read when it is planned already, by whoever knows what is written down."""
    location = written_down(table)
    if "://" in table and location != table:
        try:
            open_file(location).close()
        except Exception as error:
            if not is_trouble(error):
                raise
            raise UserError(
                f"{location} can be read only with the query or the password in its URL, which are not "
                "written down: download it, and give the file"
            ) from error


def is_list(place: str) -> bool:
    """Whether this is named like a list, or a table of images, and is no folder."""
    return list_format(place) is not None and not Path(place).is_dir()


def refuse_unused(columns: Columns, places: Sequence[str]) -> None:
    """What is said of columns is said of some source.

    Raises:
        UserError: no source is of a kind that has use for it.
    """
    formats = {found[0] for place in places if is_list(place) and (found := list_format(place))}
    for option, given, kinds in (
        ("--columns", columns.names, ("csv", "tsv")),
        ("--column-type", columns.types, ("csv", "tsv", "json", "jsonl")),
        ("--url-column", columns.url, _WITH_COLUMNS),
        ("--caption-column", columns.caption, _WITH_COLUMNS),
        ("--label-column", columns.labels, _WITH_COLUMNS),
    ):
        if given and formats.isdisjoint(kinds):
            raise UserError(
                f"{option} is of lists in {' or '.join(f'.{kind}' for kind in kinds)}, and no source is one: "
                "leave it out"
            )


def open_planned(source: SourceRecord, location: str) -> Images:
    """The images of a source that was planned, by the name that it had then: the location has no links in it.

    Raises:
        UserError: they are not there.
    """
    opened = _opened(source, location)
    opened.name = source.name
    return opened


def _opened(source: SourceRecord, location: str) -> Images:
    match source.kind:
        case SourceKind.TAR_IN_PLACE:
            return ForeignTar(location, source.name)
        case SourceKind.FILES:
            return ListedFiles(location)
        case SourceKind.IMAGE_TABLE:
            image = (source.columns or {}).get("image")
            assert image is not None
            return ImageTable(location, image, Columns())
    return open_images(location, follow_links=bool(source.follow_links))


def open_images(text: str, *, heeded: frozenset[OptOut] = ALL, follow_links: bool = False) -> Source:
    """A folder, a tar (a local one, or in a bucket), or a local WARC; see `open_listing`.

    Raises:
        UserError: it is none of them.
    """
    if is_bucket(text):
        return _remote_tar(text)
    if "://" in text:
        raise UserError(
            f"source {text} is not named like a list, and nothing else is read from there: copy it to a "
            "folder or a bucket"
        )
    path = Path(text)
    if path.is_dir():
        return FolderSource(path, follow_links=follow_links)
    if not path.exists():
        raise UserError(f"source {text} does not exist")
    if path.is_file() and os.access(path, os.R_OK) and is_tar(path):
        return TarSource(path)
    if path.is_file() and os.access(path, os.R_OK) and is_warc(path):
        return WarcSource(path, heeded=heeded)
    if path.is_file() and os.access(path, os.R_OK) and _is_arc(path):
        raise UserError(
            f"source {text} is an ARC file, which was before WARC: make a WARC of it with `warcio recompress`"
        )
    if path.is_file() and os.access(path, os.R_OK) and _is_image(path):
        raise UserError(f"source {text} is an image: give its folder, or a list of files, such as a .txt")
    if path.is_file() and os.access(path, os.R_OK) and _is_video(path):
        raise UserError(
            f"source {text} is a video: give its folder, or a list of files, such as a .txt, and --video"
        )
    raise UserError(
        f"source {text} is neither a folder, nor a readable tar (plain, gzip, bzip2, xz or zstd), nor a WARC "
        "file, nor named like a list of URLs (.parquet, .csv, .tsv, .json, .jsonl or .txt, also with .gz or "
        ".zst)"
    )


def _is_image(path: Path) -> bool:
    with path.open("rb") as file:
        return sniff(file.read(_BEGINNING)) is not None


def _is_video(path: Path) -> bool:
    with path.open("rb") as file:
        return sniff_container(file.read(_BEGINNING)) is not None


def _is_arc(path: Path) -> bool:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            return file.read(11) == b"filedesc://"
    except (OSError, EOFError, zlib.error):
        return False


def _remote_tar(url: str) -> Source:
    try:
        readable = is_tar(url)
    except FileNotFoundError:
        raise UserError(f"source {url} does not exist") from None
    if not readable:
        raise UserError(
            f"source {url} is no readable tar, and nothing else is read from there but lists of URLs"
        )
    return TarSource(url)
