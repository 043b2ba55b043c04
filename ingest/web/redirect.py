"""Where a redirect points, as browsers read its Location."""

from urllib.parse import quote

from yarl import URL

from ingest.web.url import http_url, resolve

_ASCII = "".join(map(chr, range(0x80)))


def target(url: URL, location: str) -> URL:
    """The URL to ask next.

    Args:
        url: that was asked.
        location: bytes that are no UTF-8 as surrogates.

    Raises:
        UnfetchableError: it points to no URL that can be asked.
    """
    data = location.encode("utf-8", "surrogateescape")
    try:
        location = data.decode()
    except UnicodeDecodeError:
        # Of an older encoding: the server knows its own bytes.
        location = quote(data, safe=_ASCII)
    there = resolve(location, str(url))
    if there is None:
        # With a name and a password, which are left out, or nowhere: `http_url` says why.
        there = f"{url.scheme}:{location}" if location.startswith("//") else location
    return http_url(there)
