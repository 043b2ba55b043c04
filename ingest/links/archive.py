"""The image links of one web archive: the pages of a WARC, or what a WAT says of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from fastwarc.warc import WarcRecord

from ingest.links.page import LONGEST_PAGE, Link, Page, page_links
from ingest.links.wat import wat_page
from ingest.sources.remote_trouble import is_trouble, said
from ingest.sources.warc_message import body, message
from ingest.sources.warc_records import (
    METADATA,
    RESOURCE,
    RESPONSE,
    ArchiveError,
    content_type,
    records,
    target,
)
from ingest.store.files import open_file
from ingest.web.opt_outs import OptOut, page_opt_outs
from ingest.web.url import resolve

# The JSON of a page's links can be longer than the page.
_LONGEST_ENVELOPE = 2 * LONGEST_PAGE
_PAGE_TYPES = ("text/html", "application/xhtml+xml")
_REASONS = {
    "warc_damaged": "it is damaged, or no WARC",
    "warc_truncated": "it ends within a record",
    "io_error": "it cannot be read",
}


@dataclass(kw_only=True)
class ArchiveCounts:
    """What one archive held; counts up while it is read.

    Attributes:
        records: of any kind.
        pages: web pages among them, opted out or not.
        opted_out: pages that asked not to be used.
        left_out: those among them of which that was heeded.
        found: images on the pages that are used, each address once per page.
        damaged: places at which it is damaged.
        damage: the first of them, or why it could not be read to its end; else "".
    """

    records: int = 0
    pages: int = 0
    opted_out: int = 0
    left_out: int = 0
    found: int = 0
    damaged: int = 0
    damage: str = ""


def archive_links(
    archive: str, counts: ArchiveCounts, *, heeded: frozenset[OptOut]
) -> Iterator[tuple[str, Link]]:
    """Every link with the address of its page, in the order of the archive; what is damaged is left out.

    Args:
        archive: what `open_file` opens.
        counts: is counted up.
        heeded: ways to opt out that leave out a page's images.
    """
    try:
        with open_file(archive) as file:
            for url, page in _pages(cast(BinaryIO, file), counts):
                counts.pages += 1
                counts.opted_out += bool(page.opt_outs)
                if not page.opt_outs.isdisjoint(heeded):
                    counts.left_out += 1
                    continue
                counts.found += len(page.links)
                for link in page.links:
                    yield url, link
    except ArchiveError as error:
        counts.damage = _REASONS[error.problem]
    except Exception as error:
        if not is_trouble(error):
            raise
        counts.damage = f"{_REASONS['io_error']}: {said(error)}"


def _pages(file: BinaryIO, counts: ArchiveCounts) -> Iterator[tuple[str, Page]]:
    for stored in records(file):
        if isinstance(stored, ArchiveError):
            counts.damaged += 1
            counts.damage = counts.damage or _REASONS[stored.problem]
            continue
        counts.records += 1
        try:
            found = _page(stored.record)
        except ArchiveError as error:
            if error.problem == "io_error":
                raise
            continue  # it is told of when the next record is asked for
        if found is not None:
            yield found


def _page(record: WarcRecord) -> tuple[str, Page] | None:
    if record.record_type in (RESPONSE, RESOURCE):
        return _stored_page(record)
    if record.record_type == METADATA and content_type(record.headers) == "application/json":
        return wat_page(body(record, _LONGEST_ENVELOPE))
    return None


def _stored_page(record: WarcRecord) -> tuple[str, Page] | None:
    """A page that was answered with status 200, under an address of the web."""
    url = resolve(target(record).decode("utf-8", "replace"))
    found = message(record, max_bytes=LONGEST_PAGE) if url else None
    if (
        url is None
        or found is None
        or found.status not in (200, 203)
        or found.content_type not in _PAGE_TYPES
    ):
        return None
    page = page_links(found.body, url, charset=found.charset)
    return url, Page(page.links, page.opt_outs | page_opt_outs(found.said))
