"""The images that a web page shows or names, as links to fetch.

One image, one link: of the sizes that an <img> or <source> offers, the largest. What is looked at:

- <img> and <source>: the largest candidate of `srcset` and its lazy-load names; else a lazy-load attribute,
  for `src` is then a placeholder; else `src` (of <img> only: a <source src> is a sound or a film);
- <meta> og:image, og:image:url, og:image:secure_url, twitter:image, twitter:image:src; <link rel=image_src>.

What lies in <noscript> and <template> counts: lazy pages keep their images there.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ingest.links.html_tags import attributes, decode_page, tags
from ingest.web.opt_outs import page_opts_out
from ingest.web.url import resolve

# Crawls cut pages at 1 to 5 MiB; of a longer one, this much is read.
LONGEST_PAGE = 8 << 20
_LONGEST_ALT = 2000
# Spelling in Persian and Hindi, and in emoji: ZERO WIDTH NON-JOINER and JOINER.
_JOINERS = "\u200c\u200d"
_SRCSETS = ("srcset", "data-srcset", "data-lazy-srcset")
_LAZY = (
    "data-src",
    "data-original",
    "data-lazy-src",
    "data-lazy",
    "data-url",
    "data-image",
    "data-hi-res-src",
)
_METAS = frozenset(["og:image", "og:image:url", "og:image:secure_url", "twitter:image", "twitter:image:src"])
# Relative, or of the web: no data: and no javascript:.
_LIKELY = re.compile(r"[\0- ]*(?:https?:|(?![A-Za-z][A-Za-z0-9+.-]*:)[^\0- #])", re.IGNORECASE)
_CANDIDATE = re.compile(r"[\t\n\f\r ,]*([^\t\n\f\r ]+)")
_DESCRIPTORS = re.compile(r"(?:[^,(]|\((?:[^)]*\)|[^)]*\Z))*+")
_WIDTH = re.compile(r"[0-9]{1,9}w")
_DENSITY = re.compile(r"[0-9]{0,9}(?:\.[0-9]{1,9})?(?:[eE][+-]?[0-9]{1,2})?x")


@dataclass(frozen=True, slots=True)
class Link:
    """An image to fetch: its address, as `resolve` spells it, and the text in its place, or ""."""

    url: str
    alt: str


@dataclass(frozen=True, slots=True)
class Page:
    """What a page says of images.

    Attributes:
        links: in the order of the page, each address once.
        opted_out: the page asks that its images are not indexed, or not used for AI.
    """

    links: tuple[Link, ...]
    opted_out: bool


def page_links(html: bytes, url: str, *, charset: str | None = None) -> Page:
    """The links of a page.

    Args:
        html: the page; what lies beyond LONGEST_PAGE bytes is not read.
        url: its address, as `resolve` spells it.
        charset: of its Content-Type header.
    """
    base: str | None = None
    opted_out = False
    found: list[tuple[str, str]] = []
    for name, text in tags(decode_page(html[:LONGEST_PAGE], charset)):
        if name in ("img", "source", "image"):
            found += element_images(name, attributes(text))
        elif name == "base":
            href = attributes(text).get("href")
            if base is None and href is not None:
                base = resolve(href, url) or url
        elif name == "meta":
            meta = attributes(text)
            opted_out |= robots_meta(meta)
            found += meta_images(meta)
        elif name == "link":
            link = attributes(text)
            if "image_src" in link.get("rel", "").lower().split():
                found.append((link.get("href", ""), ""))
    return Page(resolved(found, base or url), opted_out)


def resolved(found: list[tuple[str, str]], base: str) -> tuple[Link, ...]:
    """References and their texts as links, without those that are no web address, each address once."""
    links: dict[str, Link] = {}
    seen: set[str] = set()
    for reference, alt in found:
        if reference in seen:
            continue
        seen.add(reference)
        url = resolve(reference, base)
        if url is not None and url not in links:
            links[url] = Link(url, plain(alt))
    return tuple(links.values())


def element_images(name: str, element: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The reference and text of one <img> or <source>, if it has one."""
    alt = element.get("alt", "")
    candidates = (largest_candidate(element[key]) for key in _SRCSETS if key in element)
    lazy = (element[key] for key in _LAZY if key in element)
    plainly = [] if name == "source" else [element.get("src", "")]
    for reference in (*candidates, *lazy, *plainly):
        if _LIKELY.match(reference):
            yield reference, alt
            return


def meta_images(meta: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    keys = {meta.get(key, "").strip().lower() for key in ("property", "name")}
    if not _METAS.isdisjoint(keys) and "content" in meta:
        yield meta["content"], ""


def robots_meta(meta: Mapping[str, str]) -> bool:
    """Whether this <meta> opts out."""
    return meta.get("name", "").strip().lower() == "robots" and page_opts_out(meta.get("content", ""))


def largest_candidate(srcset: str) -> str:
    """The widest candidate of a `srcset`, or the densest where none has a width; "" if there is none.

    The standard's algorithm: https://html.spec.whatwg.org/multipage/images.html#parse-a-srcset-attribute.
    Addresses end at white space, so that commas in them, as in `data:`, are theirs. `data:` is passed over.
    """
    best, best_size = "", (0, 0.0)
    at = 0
    while candidate := _CANDIDATE.match(srcset, at):
        url, at = candidate[1], candidate.end()
        descriptors: list[str] = []
        if url.endswith(","):
            url = url.rstrip(",")
        elif described := _DESCRIPTORS.match(srcset, at):
            descriptors, at = described[0].split(), described.end()
        size = _size(descriptors)
        if url and size and size > best_size and url[:5].lower() != "data:":
            best, best_size = url, size
    return best


def _size(descriptors: list[str]) -> tuple[int, float] | None:
    """Width and density; None for what browsers do not take as a candidate."""
    width, density = 0, 1.0
    for descriptor in descriptors:
        if _WIDTH.fullmatch(descriptor):
            width = int(descriptor[:-1])
        elif len(descriptor) > 1 and _DENSITY.fullmatch(descriptor):
            try:
                density = float(descriptor[:-1])
            except ValueError:
                return None
        elif not descriptor.endswith("h"):
            return None
    return width, density


def plain(text: str) -> str:
    """A caption in one line, without unprintable characters but joiners, in bounds; it can be encoded."""
    words = " ".join(text[: 4 * _LONGEST_ALT].split())
    return "".join(each for each in words if each.isprintable() or each in _JOINERS)[:_LONGEST_ALT]
