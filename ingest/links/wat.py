"""The images that a WAT record names: the JSON that a crawl's extractor wrote about one web page.

An extractor lists each attribute by itself, so that sizes of one image in several attributes are several
links here; within one `srcset` the largest is taken, as in pages. The JSON quotes the page: it is hostile.
"""

import json
from typing import Any

from ingest.links.page import Page, image_reference, meta_images, resolved
from ingest.web.opt_outs import meta_opt_outs, page_opt_outs
from ingest.web.url import resolve

_IMAGES = ("IMG", "IMAGE", "AMP-IMG", "AMP-ANIM")


def wat_page(data: bytes) -> tuple[str, Page] | None:
    """The page's address and its links; None if the record tells of no answered request for a page."""
    try:
        envelope = _object(json.loads(data), "Envelope")
    except (ValueError, RecursionError):
        return None
    about = _object(envelope, "WARC-Header-Metadata")
    response = _object(envelope, "Payload-Metadata", "HTTP-Response-Metadata")
    url = resolve(_text(about, "WARC-Target-URI").strip("<>"))
    page = _object(response, "HTML-Metadata")
    if url is None or not page or str(_object(response, "Response-Message").get("Status")) != "200":
        return None
    head = _object(page, "Head")
    headers = _object(response, "Headers")
    said = {name.lower(): _texts(values) for name, values in headers.items()}
    opt_outs = page_opt_outs(lambda name: said.get(name.lower(), []))
    found: list[tuple[str, str]] = []
    for meta in _objects(head, "Metas"):
        fields = {key: _text(meta, key) for key in ("name", "property", "content")}
        opt_outs |= meta_opt_outs(fields["name"], fields["content"])
        found += meta_images(fields)
    for link in _objects(head, "Link"):
        if "image_src" in _text(link, "rel").lower().split():
            found.append((_text(link, "url"), ""))
    source = ""
    for link in _objects(page, "Links"):
        name, _, attribute = _text(link, "path").partition("@/")
        reference = image_reference({attribute: _text(link, "url")}, source=name == "SOURCE")
        if name == "SOURCE":
            source = source or reference
        elif name in _IMAGES:
            # A <source> is of the same <picture> as the <img> behind it.
            if reference or source:
                found.append((reference or source, _text(link, "alt")))
            source = ""
    base = resolve(_text(head, "Base"), url) or url
    return url, Page(resolved(found, base), opt_outs)


def _object(value: Any, *names: str) -> dict[str, Any]:
    """The object below these names, or an empty one."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _objects(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = value.get(name)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    return found if isinstance(found, str) else ""


def _texts(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
