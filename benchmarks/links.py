"""Claim: `ingest urls` finds the images that an independent HTML parser finds.

    python benchmarks/links.py WARC...

For every page the links of ingest.links.page are compared with those that BeautifulSoup with html5lib finds
by rules written anew from the same sentence: of each <img> and <source>, the largest srcset candidate, else a
lazy-load attribute, else src; and the images that <meta> and <link rel=image_src> name. Prints, for each
file, pages, images, the URLs that only one of the two found, and pages/s of ours and of the other.
"""

import argparse
import time
import warnings
from pathlib import Path
from urllib.parse import urldefrag, urljoin, urlsplit

from bs4 import BeautifulSoup
from fastwarc.warc import ArchiveIterator, WarcRecordType

from ingest.links.page import page_links
from ingest.web.url import canonical

SHOWN = 10
LAZY = [
    "data-src",
    "data-original",
    "data-lazy-src",
    "data-lazy",
    "data-url",
    "data-image",
    "data-hi-res-src",
]
META = {"og:image", "og:image:url", "og:image:secure_url", "twitter:image", "twitter:image:src"}
NAMES = ("property", "name")


def pages(path: Path) -> list[tuple[str, str | None, bytes]]:
    """Address, charset and body of every page with status 200, read without ingest."""
    found = []
    with path.open("rb") as file:
        for record in ArchiveIterator(file, record_types=WarcRecordType.response, auto_decode="all"):
            html = record.http_content_type in ("text/html", "application/xhtml+xml")
            if html and record.http_headers.status_code == 200:
                address = record.headers["WARC-Target-URI"].strip("<>")
                found.append((address, record.http_charset, record.reader.read()))
    return found


def independent(body: bytes, page: str, charset: str | None) -> set[str]:
    soup = BeautifulSoup(body, "html5lib", from_encoding=charset)
    base = next((tag["href"] for tag in soup.find_all("base") if tag.get("href")), "")
    named = [image for tag in soup.find_all(["img", "source"]) if (image := shown(tag))]
    metas = (tag for tag in soup.find_all("meta") if META & {tag.get(key, "").lower() for key in NAMES})
    named += [tag.get("content") or "" for tag in metas]
    named += [tag.get("href") or "" for tag in soup.find_all("link", rel="image_src")]
    found = set()
    for name in named:
        try:
            url = urldefrag(urljoin(urljoin(page, base), name.strip())).url
            web = name.strip() and urlsplit(url).scheme in ("http", "https")
        except ValueError:
            continue
        if web:
            found.add(canonical(url) or url)
    return found


def shown(tag) -> str:
    for key in ("srcset", "data-srcset", "data-lazy-srcset"):
        sizes = [
            words for part in (tag.get(key) or "").split(", ") if (words := part.strip(" ,\n\t").split())
        ]
        sizes = [words for words in sizes if not words[0].startswith("data:")]
        if sizes:
            return max(sizes, key=lambda words: float(words[1][:-1]) if len(words) > 1 else 1.0)[0]
    for key in [*LAZY, *(["src"] if tag.name == "img" else [])]:
        value = (tag.get(key) or "").strip()
        if value and not value.startswith("data:"):
            return value
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archives", nargs="+", type=Path)
    warnings.filterwarnings("ignore", module="bs4")
    for archive in parser.parse_args().archives:
        compare(archive)


def compare(archive: Path) -> None:
    total = {"ours": 0, "independent": 0}
    seconds = {"ours": 0.0, "independent": 0.0}
    only: dict[str, list[str]] = {"ours": [], "independent": []}
    listed = pages(archive)
    for page, charset, body in listed:
        started = time.perf_counter()
        links = page_links(body, page, charset=charset).links
        seconds["ours"] += time.perf_counter() - started
        started = time.perf_counter()
        theirs = independent(body, page, charset)
        seconds["independent"] += time.perf_counter() - started
        ours = {canonical(link.url) or link.url for link in links}
        total["ours"] += len(ours)
        total["independent"] += len(theirs)
        only["ours"] += [f"{page}: {url}" for url in sorted(ours - theirs)]
        only["independent"] += [f"{page}: {url}" for url in sorted(theirs - ours)]
    print(f"{archive.name}: {len(listed)} pages, {sum(len(body) for *_, body in listed) / 1e6:.1f} MB")
    for who, count in total.items():
        rate = len(listed) / seconds[who] if listed else 0.0
        print(f"  {who:<12} {count:>6} images, {len(only[who])} only here, {rate:,.0f} pages/s")
        for line in only[who][:SHOWN]:
            print(f"    {line}")


if __name__ == "__main__":
    main()
