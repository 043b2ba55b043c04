"""One web address, one spelling.

`resolve` reads a reference as a browser does (the URL standard, https://url.spec.whatwg.org, for http and
https only) and spells it as a browser would request it. `canonical` goes on to what RFC 3986, section 6.2.2,
calls equivalent: two spellings of one address become one, for deduplication. Both take hostile text, answer
None for what is no web address, and never raise.

`http_url` is for whoever asks: it asks for what `canonical` says. It is stricter about the host than a
browser, since another parser might see another host in an odd spelling.
"""

import ipaddress
import re
from functools import lru_cache
from urllib.parse import quote, unquote_to_bytes

import idna
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from yarl import URL

from ingest.web.problems import BAD_URL, NOT_HTTP_URL, UnfetchableError

# nginx and Apache refuse longer request lines.
LONGEST_URL = 8192
_LONGEST_HOST = 253
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_BLANK = "".join(map(chr, range(0x21)))
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HOST = re.compile(r"[a-z0-9._~-]+")
# Underscores, and hyphens at the ends, are in no host names, but serve images on the web.
_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# Behind a lone percent sign, an unescaped digit would become part of another escape.
_ESCAPE = re.compile(r"(?<!%)(?<!%[0-9A-Fa-f])%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# Lone percent signs stay, as in browsers.
_PATH_SAFE = "!$%&'()*+,-./:;=@[]_|~\\"
_QUERY_SAFE = "!$%&()*+,-./:;=?@[]_|~\\^`{}"
# Of what is asked: servers are known to refuse the others.
_ASKED_PATH_SAFE = "/%:@!$&'()*+,;=~-._"
_ASKED_QUERY_SAFE = _ASKED_PATH_SAFE.replace("'", "") + "?[]|{}^`\\"
# Escapes that are needed, in upper case; segments that are no dots; no port; for RE2.
_NEEDED = "%(?:[0189A-F][0-9A-F]|2[0-9A-CF]|3[A-F]|40|5[B-E]|60|7[B-DF])"
_PLAINLY_CANONICAL = (
    r"^https?://[a-z0-9_~-]+(?:\.[a-z0-9_~-]+)*"
    rf"(?:/(?:(?:[A-Za-z0-9!$&'()*+,:;=@\[\]_|~-]|{_NEEDED})(?:[A-Za-z0-9!$&'()*+,.:;=@\[\]_|~-]|{_NEEDED})*)?)+"
    rf"(?:\?(?:[A-Za-z0-9!$&()*+,./:;=?@\[\]_|~\\^`{{}}-]|{_NEEDED})*)?$"
)


def resolve(reference: str, base: str = "") -> str | None:
    """The absolute http(s) address that `reference` names, without its fragment.

    Args:
        reference: as it stands in a page.
        base: an answer of this function, or "" if `reference` must be absolute.

    Returns:
        Printable ASCII of at most LONGEST_URL characters; None for another scheme, credentials, an address
        without a host that could exist, or an empty reference.
    """
    before, question, query = _before_query(reference[: 4 * LONGEST_URL])
    before = before.replace("\\", "/")
    if not before and not question:
        return None
    scheme, authority, path = _absolute(before, base)
    place = _host_and_port(authority, scheme)
    if place is None:
        return None
    host = ":".join(filter(None, place))
    if base and not before:
        path = _split(base)[2]
    elif not path.startswith("/"):
        path = _split(base)[2].rpartition("/")[0] + "/" + path
    path = quote(_without_dots(path), safe=_PATH_SAFE, errors="replace")
    url = f"{scheme}://{host}{path}{question}{quote(query, safe=_QUERY_SAFE, errors='replace')}"
    return url if len(url) <= LONGEST_URL else None


def canonical(url: str) -> str | None:
    """The one spelling of an absolute address: resolved, and no escape without need, in upper case.

    Scheme and host are in lower case, the host in its ASCII form, the default port, dot segments and the
    fragment are gone; the query is kept. Applied to its own answer it changes nothing.
    """
    resolved = resolve(url)
    return None if resolved is None else _ESCAPE.sub(_escape, resolved)


def canonical_all(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    """`canonical` of each text, and what is no address as it is; fast where most are spelled so."""
    other = np.flatnonzero(~np.asarray(pc.match_substring_regex(urls, _PLAINLY_CANONICAL).fill_null(True)))
    if not len(other):
        return urls
    texts = urls.take(other).to_pylist()
    flat = urls.combine_chunks()
    mask = np.zeros(len(flat), bool)
    mask[other] = True
    spelled = pa.array([canonical(text) or text for text in texts], flat.type)
    return pa.chunked_array([pc.replace_with_mask(flat, pa.array(mask), spelled)])


def http_url(text: str) -> URL:
    """The URL to ask for, spelled as `canonical` has it: without fragment, name and password, dot segments.

    Raises:
        UnfetchableError: it is not of http or https, or malformed. An IPv4 address in any but the usual
            spelling (`127.1`, `0x7f.0.0.1`, `2130706433`) is malformed.
    """
    before, _, query = _before_query(text.strip())
    found = _SCHEME.match(before)
    scheme = found[1].lower() if found else ""
    if len(text) > LONGEST_URL:
        raise UnfetchableError(BAD_URL)
    if found is None or scheme not in _DEFAULT_PORTS:
        raise UnfetchableError(NOT_HTTP_URL)
    rest = before[found.end() :]
    authority, path = _authority_and_path(rest[2:])
    asked = authority.rpartition("@")[2]
    # A host with an escape or a backslash is one host to some parsers, and another to others.
    place = None if "%" in asked or "\\" in authority else _host_and_port(asked, scheme)
    if not rest.startswith("//") or place is None or not _is_plain(place[0]):
        raise UnfetchableError(BAD_URL)
    host, port = place
    try:
        return URL.build(
            scheme=scheme,
            host=host.removesuffix("."),
            port=int(port) if port else None,
            path=_ESCAPE.sub(
                _escape, _without_dots(quote(path.replace("\\", "/") or "/", safe=_ASKED_PATH_SAFE))
            ),
            query_string=_ESCAPE.sub(_escape, quote(query, safe=_ASKED_QUERY_SAFE)),
            encoded=True,
        )
    except ValueError:  # half a character, which nothing can spell
        raise UnfetchableError(BAD_URL) from None


def host_of(url: str) -> str:
    """The host of an answer of `resolve`, without port."""
    authority = _split(url)[1]
    return authority.partition("]")[0] + "]" if authority.startswith("[") else authority.partition(":")[0]


def _escape(match: re.Match[str]) -> str:
    character = chr(int(match[1], 16))
    return character if character in _UNRESERVED else match[0].upper()


def _split(url: str) -> tuple[str, str, str]:
    """Scheme, authority and path of a resolved address."""
    scheme, _, rest = url.partition("?")[0].partition("://")
    return scheme, *_authority_and_path(rest)


def _authority_and_path(rest: str) -> tuple[str, str]:
    """Of what stands behind the two slashes."""
    authority, slash, path = rest.partition("/")
    return authority, slash + path


def _absolute(before: str, base: str) -> tuple[str, str, str]:
    """Scheme, authority and path of what stands before the query; the path may still be relative."""
    scheme = ""
    if match := _SCHEME.match(before):
        scheme, rest = match[1].lower(), before[match.end() :]
        # As browsers have it, `https:a.png` on a page of https names a file beside it.
        relative = rest and base and scheme == _split(base)[0] and not rest.startswith("//")
        before = rest if relative else "//" + rest.lstrip("/")
    elif base:
        scheme = _split(base)[0]
    if before.startswith("//"):
        authority, slash, path = before.lstrip("/").partition("/")
        return scheme, authority, slash + path if slash else "/"
    return scheme, _split(base)[1] if base else "", before


def _before_query(text: str) -> tuple[str, str, str]:
    """What stands before the query, the question mark, and the query; the fragment is gone."""
    text = text.strip(_BLANK)
    for control in "\t\n\r":
        text = text.replace(control, "")
    return text.partition("#")[0].partition("?")


@lru_cache(maxsize=4096)
def _host_and_port(authority: str, scheme: str) -> tuple[str, str] | None:
    """The host in ASCII and lower case, and the port, "" for the scheme's own; None if it is none."""
    if scheme not in _DEFAULT_PORTS or "@" in authority:
        return None
    name, colon, port = authority.rpartition(":")
    if not colon or "]" in port:
        name, port = authority, ""
    if port and not (port.isascii() and port.isdigit() and len(port) < 12 and int(port) < 65536):
        return None
    host = _ipv6(name[1:-1]) if name.startswith("[") and name.endswith("]") else _name(name)
    port = port.lstrip("0") or ("0" if port else "")
    return None if host is None else (host, "" if port == _DEFAULT_PORTS[scheme] else port)


def _ipv6(text: str) -> str | None:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return None
    return None if address.scope_id else f"[{address.compressed}]"


def _name(text: str) -> str | None:
    """A host name in ASCII and lower case."""
    if len(text) > 4 * _LONGEST_HOST:
        return None
    # Half a character stays as it is in `replace`, and is no part of a name.
    name = unquote_to_bytes(text.encode("utf-8", "replace")).decode("utf-8", "replace")
    if not name.isascii():
        name = _ascii(name[: _LONGEST_HOST + 1])
    name = name.lower()
    labels = name.removesuffix(".").split(".")
    fits = len(name) <= _LONGEST_HOST and all(0 < len(label) < 64 for label in labels)
    return name if fits and _HOST.fullmatch(name) else None


def _ascii(name: str) -> str:
    """An international name as DNS has it, or ""; as in browsers, also one that only IDNA 2003 knows."""
    try:
        return idna.encode(name, uts46=True).decode("ascii")
    except UnicodeError:  # of idna, too
        try:
            return name.encode("idna").decode("ascii")
        except UnicodeError:
            return ""


def _is_plain(host: str) -> bool:
    """Whether a host of `_host_and_port` can be read in one way only."""
    if host.startswith("["):
        return True
    name = host.removesuffix(".")
    labels = name.split(".")
    if not _NUMBER.fullmatch(labels[-1]):
        return all(map(_LABEL.fullmatch, labels))
    try:
        ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return True


def _without_dots(path: str) -> str:
    """The path without "." and ".." segments, however they are escaped."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for number, segment in enumerate(segments):
        plain = segment.replace("%2e", ".").replace("%2E", ".")
        if plain == "..":
            del kept[-1:]
        elif plain != ".":
            kept.append(segment)
        if plain in (".", "..") and number == len(segments) - 1:
            kept.append("")
    return "/" + "/".join(kept)
