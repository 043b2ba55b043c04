"""Bodies in a Content-Encoding, piece by piece, and no more of them at a time than was asked for."""

import gzip
import zlib

import brotli
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.web.content_encoding import BadEncodingError, decoder

ENCODERS = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "members": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]) + bytes(4),
}


@given(
    name=st.sampled_from(list(ENCODERS)),
    words=st.lists(st.binary(max_size=4), max_size=20),
    repeats=st.integers(1, 200),
    step=st.integers(1, 300),
    limit=st.integers(0, 400),
)
def test_what_is_held_back_comes_later_and_nothing_is_lost(name, words, repeats, step, limit):
    plain = b"".join(words) * repeats
    encoded = ENCODERS[name](plain)
    decoding = decoder("gzip" if name == "members" else name)
    decoded = b""
    for start in range(0, len(encoded), step):
        piece = encoded[start : start + step]
        while True:
            got = decoding.feed(piece, limit)
            decoded, piece = decoded + got, b""
            if len(got) <= limit:
                break
    assert decoded == plain
    assert decoding.complete


@pytest.mark.parametrize("name", ENCODERS)
def test_D4_little_more_comes_out_than_was_asked_for(name):
    decoding = decoder("gzip" if name == "members" else name)
    assert len(decoding.feed(ENCODERS[name](bytes(32 << 20)), 1 << 20)) < 4 << 20


@pytest.mark.parametrize("name", ["zstd", "ZSTD", "utf-8, zstd", "compress", "dcb", "gzip, gzip"])
def test_what_encodes_and_cannot_be_read_is_not_taken_for_its_content(name):
    with pytest.raises(BadEncodingError):
        decoder(name)


def test_D4_a_gzip_of_nothing_but_members_is_refused_before_it_has_cost_much():
    with pytest.raises(BadEncodingError):
        decoder("gzip").feed(gzip.compress(b"") * 10_000, 1 << 20)
    blocks = [bytes([n % 256]) * 60_000 + bytes(range(256)) * 8 for n in range(300)]
    decoding = decoder("gzip")
    got = b"".join(decoding.feed(gzip.compress(block, 0), 1 << 20) for block in blocks)
    assert got == b"".join(blocks)
