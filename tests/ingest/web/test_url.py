"""Web addresses: one spelling for links, and none that two parsers could read as two hosts."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.web.problems import UnfetchableError
from ingest.web.url import LONGEST_URL, canonical, canonical_all, host_of, http_url, resolve

PAGE = "http://host.example/dir/page?q"


@pytest.mark.parametrize(
    ("reference", "url"),
    [
        ("HTTP://Host.EXAMPLE:080/%7ea/./b/%2e%2E/%c3%bc?Q=%7e#f", "http://host.example/~a/%C3%BC?Q=~"),
        ("https:\\\\host.example\\a?b\\c", "https://host.example/a?b\\c"),
        ("//höst.example:443", "http://xn--hst-sna.example:443/"),
        ("/a b\t\nü?d e", "http://host.example/a%20b%C3%BC?d%20e"),
        ("../../../x/..", "http://host.example/"),
        ("?r", "http://host.example/dir/page?r"),
        ("http://[0:0::1]:8080/x", "http://[::1]:8080/x"),
        ("http://under_score.example./100%", "http://under_score.example./100%"),
        ("http://☃.example/", "http://xn--n3h.example/"),
        ("http://%\udcff/", None),
        ("http://me:secret@host.example/", None),
        ("http://host.example:99999/", None),
        ("http://ho st.example/", None),
        ("http:a.jpg", "http://host.example/dir/a.jpg"),
        ("http:/a.jpg", "http://host.example/a.jpg"),
        ("https:/other.example/a", "https://other.example/a"),
        ("http:", None),
        ("http://host.example:1000080/", None),
        ("/%%32e%%32e/%4%31", "http://host.example/%%32e%%32e/%4%31"),
        ("http:///", None),
        ("http://[fe80::1%25eth0]/", None),
        ("http://" + "a" * 64 + ".example/", None),
        ("ftp://host.example/a", None),
        ("#top", None),
        ("/" + "a" * LONGEST_URL, None),
    ],
)
def test_addresses_have_one_spelling(reference, url):
    answer = resolve(reference, PAGE)
    assert (answer and canonical(answer)) == url


URLISH = st.text(st.sampled_from("aZ09%2eE7.:/\\?#@[]-_~ü ߀\t\n\0&;=x") | st.characters(), max_size=40)


@settings(max_examples=400, deadline=None)
@given(URLISH, st.sampled_from(["", "http://", "https:", "//a.example", "http://[", "http://a:"]))
def test_canonical_is_idempotent_and_plain(text, start):
    url = resolve(start + text, PAGE)
    if url is None:
        return
    assert url.isascii() and url.isprintable() and " " not in url and "#" not in url
    assert resolve(url) == url
    assert host_of(url)
    once = canonical(url)
    assert once is not None
    assert canonical(once) == once


@pytest.mark.parametrize(
    "text",
    [
        "http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://127.1/", "http://0177.0.0.1/",
        "http://127.0.0.1.5/", "http://1.2.3/", "http://%31%32%37.0.0.1/", "http://a%00b/", "http:///x", "http://",
        "http://a..b/", "http://host:99999/", "http://host:x/", "http://a b/", "http://[::1/", "http://[::1%25lo]/",
        "http://127.0.0.1\\@example.org/", "http://\udcff/", "http://a/\udcff", "http:example.org",
        "http://a[::1]/", "http://%\udcff/", "http://a/" + "x" * 9000, "http://" + "a." * 200 + "b/",
    ],
)  # fmt: skip
def test_D4_odd_spellings_are_no_urls(text):
    with pytest.raises(UnfetchableError, match="bad_url"):
        http_url(text)


@pytest.mark.parametrize(
    "text", ["file:///etc/passwd", "ftp://a/", "//a/b", "a/b", "", "data:,x", "gopher://a", "javascript:1"]
)
def test_S1_only_http_and_https_are_asked(text):
    with pytest.raises(UnfetchableError, match="not_http_url"):
        http_url(text)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("HTTP://EXAMPLE.org:80/a/../b?c=d#e", "http://example.org/b?c=d"),
        ("https://example.org.", "https://example.org/"),
        ("http://user:pw@example.org:8080/x", "http://example.org:8080/x"),
        ("http://bücher.de/ü x?q=ü&r=a%2Fb", "http://xn--bcher-kva.de/%C3%BC%20x?q=%C3%BC&r=a%2Fb"),
        ("http://user%40x:p%2fw@example.org/", "http://example.org/"),
        ("http://a_b.bücher.de/", "http://a_b.xn--bcher-kva.de/"),
        ("http://☃.net/", "http://xn--n3h.net/"),
        ("http://-love-.a-.example.org/", "http://-love-.a-.example.org/"),
        ("http://a_b.example.org/%7Efoo%2f+?%7e%41%c3", "http://a_b.example.org/~foo%2F+?~A%C3"),
        ("http://1.2.3.4./", "http://1.2.3.4/"),
        ("http://[2606:4700::1111]:81/", "http://[2606:4700::1111]:81/"),
        ("http://１.2.3.4/", "http://1.2.3.4/"),
        ("http://a/b/%2E%2e/c/.", "http://a/c/"),
        ("http://a/x?sig=a%2Bb+c==&t={1}|2", "http://a/x?sig=a%2Bb+c==&t={1}|2"),
    ],
)
def test_a_url_is_asked_as_its_one_spelling_says(text, url):
    assert str(http_url(text)) == url


@given(st.text(max_size=60), st.sampled_from(["http://", "https://a/", "http://a:80/?", ""]))
def test_D4_any_text_is_a_url_or_a_problem_and_normalising_twice_changes_nothing(text, start):
    try:
        url = http_url(start + text)
    except UnfetchableError as error:
        assert error.problem.reason in ("bad_url", "not_http_url")
        return
    assert http_url(str(url)) == url
    assert (
        url.scheme in ("http", "https") and url.raw_host and url.user is None and url.raw_path.startswith("/")
    )


@settings(max_examples=200, deadline=None)
@given(URLISH, st.sampled_from(["http://a/", "https://a.B:80/?", "http://a.b", "https://%41.x/"]))
def test_what_is_asked_is_what_the_one_spelling_says(text, start):
    url = (start + text).strip()
    same = canonical(url)
    try:
        asked = http_url(url)
    except UnfetchableError:
        return
    assert same is None or http_url(same) == asked


PARTS = st.sampled_from(
    ["a", ".", "..", "%2E", "%C3%BC", "%c3", "~", "'", "|", "?", "/", "\\", "%", ":80", "#", "B", "@"]
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda start, parts: start + "".join(parts),
            st.sampled_from(["http://a", "x"]),
            st.lists(PARTS, max_size=6),
        ),
        max_size=9,
    )
)
def test_many_are_spelled_as_each(urls):
    column = pa.chunked_array([pa.array(urls, pa.string())])
    assert canonical_all(column).to_pylist() == [canonical(url) or url for url in urls]
