"""The images that a web page shows or names, as links to fetch.

One image, one link: of the sizes that an <img> offers, the largest. What is looked at:

- <img> and AMP's <amp-img>: the largest candidate of `srcset` and its lazy-load names; else a lazy-load
  attribute, for `src` is then a placeholder; else `src`. A <source> of its <picture>, which is the same image
  in another format or for another screen, only if it has none of its own;
- <meta> og:image, og:image:url, og:image:secure_url, twitter:image, twitter:image:src; <link rel=image_src>.

What lies in <noscript> and <template> counts: lazy pages keep their images there. What scripts have yet to
fill in, and what is no address of an image, does not.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ingest.links.html_tags import attributes, decode_page, tags
from ingest.web.opt_outs import OptOut, meta_opt_outs
from ingest.web.url import resolve

# Crawls cut pages at 1 to 5 MiB; of a longer one, this much is read.
LONGEST_PAGE = 8 << 20
_LONGEST_ALT = 2000
# Spelling in Persian and Hindi, and in emoji: ZERO WIDTH NON-JOINER and JOINER.
_JOINERS = "\u200c\u200d"
_MOST_LINKS = 10_000
_LAZY_SRCSETS = ("data-srcset", "data-lazy-srcset")
# Attributes that tell of an image where `src` waits; the last may tell of anything else, too.
_LAZY = (
    "data-src",
    "data-original",
    "data-lazy-src",
    "data-lazy",
    "data-hi-res-src",
    "data-url",
    "data-image",
)
_AMBIGUOUS = frozenset(["data-url", "data-image"])
_IMAGES = frozenset(["img", "image", "amp-img", "amp-anim"])
# Of a <picture> without an image of its own, the last to be taken.
_RARELY_READ = frozenset(["image/avif", "image/jxl", "image/heic", "image/heif", "image/svg+xml"])
_METAS = frozenset(["og:image", "og:image:url", "og:image:secure_url", "twitter:image", "twitter:image:src"])
# Relative, or of the web: no data: and no javascript:.
_LIKELY = re.compile(r"[\0- ]*(?:https?:|(?![A-Za-z][A-Za-z0-9+.-]*:)[^\0- #])", re.IGNORECASE)
# A place for a script to write to, or JSON: {{src}}, ${src}, <%= src %>, [[src]], {width}, {"src": …}.
_TEMPLATE = re.compile(r"[\0- ]*[\[{]|\$\{|\{[{%A-Za-z]|<%|\[\[", re.IGNORECASE)
_FILE_NAME = re.compile(r"[^?#]*\.([A-Za-z0-9]{1,5})[\0- ]*(?:[?#]|\Z)", re.DOTALL)
_IMAGE_NAMES = frozenset("jpg jpeg jpe jfif png gif webp avif bmp tif tiff".split())  # noqa: SIM905
_PAGE_NAMES = frozenset("htm html xhtml shtml asp jsp js json css mp4 webm pdf".split())  # noqa: SIM905
_CANDIDATE = re.compile(r"[\t\n\f\r ,]*([^\t\n\f\r ]+)")
_DESCRIPTORS = re.compile(r"(?:[^,(]|\((?:[^)]*\)|[^)]*\Z))*+")
_NOTHING, _PLAINLY = (0, 0.0), (0, 1.0)
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
        opt_outs: the ways in which the page asks that its images are not indexed, or not used for AI.
    """

    links: tuple[Link, ...]
    opt_outs: frozenset[OptOut]


def page_links(html: bytes, url: str, *, charset: str | None = None) -> Page:
    """The links of a page.

    Args:
        html: the page; what lies beyond LONGEST_PAGE bytes is not read.
        url: its address, as `resolve` spells it.
        charset: of its Content-Type header.
    """
    base: str | None = None
    opt_outs: frozenset[OptOut] = frozenset()
    found: list[tuple[str, str]] = []
    # Those of the <picture> that is open, until its <img>.
    sources: list[dict[str, str]] | None = None
    for name, text in tags(decode_page(html[:LONGEST_PAGE], charset)):
        if name in _IMAGES:
            image = attributes(text)
            reference = image_reference(image) or _of_sources(sources or [])
            if reference:
                found.append((reference, image.get("alt", "")))
            sources = None
        elif name == "source":
            if sources is not None:
                sources.append(attributes(text))
        elif name in ("picture", "/picture"):
            sources = [] if name == "picture" else None
        elif name == "base":
            href = attributes(text).get("href")
            if base is None and href is not None:
                base = resolve(href, url) or url
        elif name == "meta":
            meta = attributes(text)
            opt_outs |= meta_opt_outs(meta.get("name", ""), meta.get("content", ""))
            found += meta_images(meta)
        elif name == "link":
            link = attributes(text)
            if "image_src" in link.get("rel", "").lower().split():
                found.append((link.get("href", ""), ""))
    return Page(resolved(found, base or url), opt_outs)


def resolved(found: list[tuple[str, str]], base: str) -> tuple[Link, ...]:
    """References and their texts as links, without those that are no web address, each address once.

    Of its texts the first that is not empty; and at most 10,000 links, for more are made by no hand.
    """
    texts: dict[str, str] = {}
    urls: dict[str, str | None] = {}
    for reference, alt in found:
        if reference not in urls:
            urls[reference] = resolve(reference, base)
        url = urls[reference]
        if url is None or texts.get(url):
            continue
        if url not in texts and len(texts) == _MOST_LINKS:
            break
        texts[url] = plain(alt)
    return tuple(Link(url, text) for url, text in texts.items())


def image_reference(element: Mapping[str, str], *, source: bool = False) -> str:
    """The reference of one <img>, or of a <source> in a <picture>; "" if it has none."""
    lazy, lazy_size = _largest(element[key] for key in _LAZY_SRCSETS if key in element)
    shown, size = _largest([element["srcset"]] if "srcset" in element else [])
    if lazy or shown:
        if lazy_size >= size and lazy:
            return lazy
        # Of one size, it may be a placeholder as `src` may.
        if size > _PLAINLY:
            return shown
    src = shown or ("" if source else element.get("src", ""))
    if not _is_usable(src):
        src = ""
    for key in _LAZY:
        value = element.get(key)
        if value and _is_usable(value) and _tells_of_image(value, unless=key in _AMBIGUOUS and bool(src)):
            return value
    return src


def _of_sources(sources: Sequence[Mapping[str, str]]) -> str:
    usual = sorted(sources, key=lambda source: source.get("type", "").strip().lower() in _RARELY_READ)
    return next(filter(None, (image_reference(each, source=True) for each in usual)), "")


def _is_usable(reference: str) -> bool:
    """Whether it may be an address of the web, and is not to be filled in first."""
    return _LIKELY.match(reference) is not None and _TEMPLATE.search(reference) is None


def _tells_of_image(value: str, *, unless: bool) -> bool:
    """Whether the value of an attribute of no fixed meaning names an image; `unless` it does not say so."""
    named = _FILE_NAME.match(value)
    kind = named[1].lower() if named else ""
    if kind in _IMAGE_NAMES:
        return True
    return "/" in value and kind not in _PAGE_NAMES and not unless


def meta_images(meta: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    keys = {meta.get(key, "").strip().lower() for key in ("property", "name")}
    if not _METAS.isdisjoint(keys) and "content" in meta:
        yield meta["content"], ""


def largest_candidate(srcset: str) -> tuple[str, tuple[int, float]]:
    """The widest candidate of a `srcset`, or the densest where none has a width, and its size; "" for none.

    The standard's algorithm: https://html.spec.whatwg.org/multipage/images.html#parse-a-srcset-attribute.
    Addresses end at white space, so that commas in them, as in `data:`, are theirs. What is no address of the
    web is passed over, and so are pictures of one pixel's width.
    """
    best, best_size = "", _NOTHING
    at = 0
    while candidate := _CANDIDATE.match(srcset, at):
        url, at = candidate[1], candidate.end()
        descriptors: list[str] = []
        if url.endswith(","):
            url = url.rstrip(",")
        elif described := _DESCRIPTORS.match(srcset, at):
            descriptors, at = described[0].split(), described.end()
        size = _size(descriptors)
        if url and size and size > best_size and size[0] != 1 and _is_usable(url):
            best, best_size = url, size
    return best, best_size


def _largest(srcsets: Iterable[str]) -> tuple[str, tuple[int, float]]:
    return max(map(largest_candidate, srcsets), key=lambda candidate: candidate[1], default=("", _NOTHING))


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
