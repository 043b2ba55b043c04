"""Whose host it is: the registrable domain of a URL."""

import hashlib
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

if TYPE_CHECKING:
    import tldextract

_HOST = r"^\s*[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#]*@)?(?P<host>\[[^\]]*\]|[^/?#:\s]+)"
# What most are like, and several times as fast.
_PLAIN_HOST = r"^https?://(?P<host>[a-z0-9._-]+)/"


@cache
def _suffixes() -> "tldextract.TLDExtract":
    """By the list inside the package: nothing is fetched. github.io and the like are suffixes of sites."""
    import tldextract  # takes long: it can fetch, too

    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None, include_psl_private_domains=True)


def registrable_domain(host: str) -> str:
    """The part of a host's name that somebody owns: `b.co.uk` of `img.b.co.uk`; itself if there is none."""
    found = _suffixes()(host.rstrip("."))
    return found.top_domain_under_public_suffix or host


@lru_cache(maxsize=1 << 20)
def _domain_hash(host: str) -> int:
    digest = hashlib.sha256(registrable_domain(host).encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:8], "big")


def hosts_of(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    """The host that each URL, of any scheme, names: in lower case, else as it is written; null for no URL."""
    hosts = pc.struct_field(pc.extract_regex(urls, _PLAIN_HOST), "host")
    if hosts.null_count == 0:
        return hosts
    others = hosts.is_null()
    found = pc.utf8_lower(pc.struct_field(pc.extract_regex(urls.filter(others), _HOST), "host"))
    flat = pc.replace_with_mask(hosts.combine_chunks(), others.combine_chunks(), found.combine_chunks())
    return pa.chunked_array([flat])


def domain_hashes(urls: pa.ChunkedArray) -> NDArray[np.uint64]:
    """64 bits of a hash of each URL's registrable domain, (n,); all that is no URL counts as one domain."""
    encoded = hosts_of(urls).fill_null("").combine_chunks().dictionary_encode()
    hashes = np.array([_domain_hash(host) for host in encoded.dictionary.to_pylist()], np.uint64)
    return hashes[encoded.indices.to_numpy()] if len(hashes) else np.zeros(0, np.uint64)
