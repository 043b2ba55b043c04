"""From what a user names to a source of images."""

import os
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
from ingest.store.clients import is_bucket


def open_listing(text: str, columns: Columns) -> Listing:
    """What `open_images` opens, or a list of URLs, to be planned.

    Raises:
        UserError: it is none of them.
    """
    if list_format(text) is not None and not Path(text).is_dir():
        return UrlList(text, columns)
    return ImageListing(open_images(text))


def open_planned(source: SourceRecord, location: str) -> Source:
    """The images of a source that was planned.

    Raises:
        UserError: they are not there.
    """
    return ForeignTar(location, source.name) if source.kind.stays_in_place else open_images(location)


def open_images(text: str) -> Source:
    """A folder, a tar (a local one, or in a bucket), or a local WARC.

    Raises:
        UserError: it is none of them.
    """
    if is_bucket(text):
        return _remote_tar(text)
    path = Path(text)
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise UserError(f"source {text} does not exist")
    if path.is_file() and os.access(path, os.R_OK) and is_tar(path):
        return TarSource(path)
    if path.is_file() and os.access(path, os.R_OK) and is_warc(path):
        return WarcSource(path)
    raise UserError(
        f"source {text} is neither a folder, nor a readable tar (plain, gzip, bzip2 or xz), nor a WARC file, "
        "nor named like a list of URLs (.parquet, .csv, .tsv, .jsonl or .txt, also with .gz or .zst)"
    )


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
