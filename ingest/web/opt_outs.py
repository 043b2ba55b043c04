"""What sites say against the use of their images, in headers and in pages."""

from collections.abc import Iterable, Iterator

# What robots.txt and X-Robots-Tag call us.
TOKEN = "seer-ingest"
_OF_IMAGES = frozenset(["noai", "noimageai", "noimageindex"])
# `none` means noindex and nofollow.
_OF_THE_ANSWER = _OF_IMAGES | {"noindex", "none"}
# Directives with a colon of their own: no robot's name.
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


def image_opts_out(headers: Iterable[str]) -> bool:
    """Whether X-Robots-Tag headers of an image keep it from us, or from all robots."""
    return any(not _OF_THE_ANSWER.isdisjoint(_directives(header)) for header in headers)


def page_opts_out(directives: str) -> bool:
    """Whether a page's robots <meta>, or X-Robots-Tag header, keeps its images from us, or from all robots.

    `noindex` and `none` are about the page itself, which is not what is fetched: its images may be shown on
    others, and say for themselves what they want.
    """
    return not _OF_IMAGES.isdisjoint(_directives(directives))


def _directives(text: str) -> Iterator[str]:
    """Those that concern us; a robot's name limits what follows to the robot of that name."""
    concerns_us = True
    for item in text.lower().split(","):
        name, colon, directive = item.partition(":")
        if colon and name.strip() not in _VALUED:
            concerns_us = name.strip() in (TOKEN, "*")
        else:
            directive = item
        if concerns_us:
            yield directive.strip()
