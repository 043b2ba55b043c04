"""What sites say against the use of their images, in headers and in pages."""

from collections.abc import Iterable

_PAGE_OPT_OUTS = frozenset(["noai", "noimageai", "noimageindex"])
# What robots.txt and X-Robots-Tag call us.
TOKEN = "seer-ingest"
_OPT_OUTS = ("noai", "noimageai", "noindex", "noimageindex", "none")
# Directives with a colon of their own: no robot's name.
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


def opted_out(headers: Iterable[str]) -> bool:
    """Whether X-Robots-Tag headers keep this image from us, or from all robots.

    `noai`, `noimageai`, `noindex`, `noimageindex`, and `none`, which means noindex and nofollow; a name
    before them limits what follows in that header to the robot of that name.
    """
    for header in headers:
        concerns_us = True
        for item in header.lower().split(","):
            name, colon, directive = item.partition(":")
            if colon and name.strip() not in _VALUED:
                concerns_us = name.strip() in (TOKEN, "*")
            else:
                directive = item
            if concerns_us and directive.strip() in _OPT_OUTS:
                return True
    return False


def opts_out(directives: str) -> bool:
    """Whether a robots <meta> or an X-Robots-Tag header opts out, for every crawler."""
    for directive in directives.lower().split(","):
        name, colon, _ = directive.partition(":")
        if colon and name.strip() not in _VALUED:
            # Whom a name addresses, everything after it addresses.
            return False
        if name.strip() in _PAGE_OPT_OUTS:
            return True
    return False
