"""From what a user names to a source of images."""

import gzip
import os
import zlib
from pathlib import Path

from cluster.errors import UserError
from ingest.dataset.plan_record import SourceRecord
from ingest.sources.folder import FolderSource
from ingest.sources.image_listing import ImageListing
from ingest.sources.source import Listing, Source
from ingest.sources.tar import TarSource, is_tar
from ingest.sources.tar_in_place import ForeignTar
from ingest.sources.url_list import Columns, UrlList, list_format
from ingest.sources.warc import WarcSource, is_warc
from ingest.web.opt_outs import ALL, OptOut


def open_listing(text: str, columns: Columns, *, heeded: frozenset[OptOut] = ALL) -> Listing:
    """What `open_images` opens, or a list of URLs, to be planned.

    Args:
        text: what a user names.
        columns: of a list.
        heeded: ways to opt out that are obeyed of the answers that an archive stores.

    Raises:
        UserError: it is none of them.
    """
    if list_format(text) is not None and not Path(text).is_dir():
        return UrlList(text, columns)
    return ImageListing(open_images(text, heeded=heeded))


def open_planned(source: SourceRecord, location: str) -> Source:
    """The images of a source that was planned.

    Raises:
        UserError: they are not there.
    """
    return ForeignTar(location, source.name) if source.kind.stays_in_place else open_images(location)


def open_images(text: str, *, heeded: frozenset[OptOut] = ALL) -> Source:
    """A folder, a tar (a local one, or on S3), or a local WARC; see `open_listing`.

    Raises:
        UserError: it is none of them.
    """
    if text.startswith("s3://"):
        return _remote_tar(text)
    path = Path(text)
    if path.is_dir():
        return FolderSource(path)
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
    raise UserError(
        f"source {text} is neither a folder, nor a readable tar (plain, gzip, bzip2, xz or zstd), nor a WARC "
        "file, nor named like a list of URLs (.parquet, .csv, .tsv, .json, .jsonl or .txt, also with .gz or "
        ".zst)"
    )


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
