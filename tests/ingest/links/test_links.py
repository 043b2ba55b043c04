"""Pages from strangers: every image found as a browser would find it, in bounded time, and nothing raises."""

import time

import html5lib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.links.html_tags import attributes, decode_page, tags
from ingest.links.page import LONGEST_PAGE, Link, largest_candidate, page_links
from ingest.web.opt_outs import OptOut, page_opt_outs
from ingest.web.url import resolve

PAGE = "http://host.example/dir/page?q"


def found(html, **options):
    page = html if isinstance(html, bytes) else html.encode()
    return [link.url for link in page_links(page, PAGE, **options).links]


@pytest.mark.parametrize(
    ("srcset", "largest"),
    [
        ("a.jpg", "a.jpg"),
        ("a.jpg 1x, b.jpg 2x, c.jpg 1.5x", "b.jpg"),
        ("a.jpg 320w,b.jpg 1280w , c.jpg 640w", "b.jpg"),
        ("a.jpg, b.jpg 2x", "b.jpg"),
        ("a.jpg,b.jpg", "a.jpg,b.jpg"),
        ("/w_200,h_100/a.jpg 200w, /w_400,h_200/a.jpg 400w", "/w_400,h_200/a.jpg"),
        ("data:image/gif;base64,AAAA,BB 3x, b.jpg 2x", "b.jpg"),
        ("data:image/gif;base64,AAAA 1x", ""),
        ("a.jpg 100w 50h, b.jpg 90w 900h", "a.jpg"),
        ("a.jpg 2x (x, 9w), b.jpg 1x", "b.jpg"),
        ("a.jpg 9z, b.jpg 1x", "b.jpg"),
        ("a.jpg -3x, b.jpg .5x", "b.jpg"),
        ("a.jpg 1e1x, b.jpg 9x", "a.jpg"),
        ("  ,, ,a.jpg\n\t2x,,", "a.jpg"),
        ("a.jpg 2x, b.jpg 2x", "a.jpg"),
        ("a.jpg 99999999999999999999w, b.jpg 1x", "b.jpg"),
        ("a.jpg (", ""),
        ("", ""),
    ],
)
def test_largest_candidate_of_srcset(srcset, largest):
    assert largest_candidate(srcset)[0] == largest


@pytest.mark.parametrize(
    ("html", "urls"),
    [
        ('<img src=" a.jpg\n">', ["http://host.example/dir/a.jpg"]),
        ("<IMG SRC=/a.jpg/>", ["http://host.example/a.jpg/"]),
        ("<img alt='<img src=no>' src='a>b'>", ["http://host.example/dir/a%3Eb"]),
        ("<img src=a src=b><img/src=c/d>", ["http://host.example/dir/a", "http://host.example/dir/c/d"]),
        ("<img src=a.gif data-src=b.jpg>", ["http://host.example/dir/b.jpg"]),
        ("<img src=a.gif data-src='data:x'>", ["http://host.example/dir/a.gif"]),
        ("<img src=a data-src=b srcset='c 1x, d 2x'>", ["http://host.example/dir/d"]),
        ("<img srcset='data:a 1x' data-srcset='c 1x, d 2x'>", ["http://host.example/dir/d"]),
        ("<meta property='og:image' content='//cdn.example/x'>", ["http://cdn.example/x"]),
        ("<meta name=twitter:image content=x><meta name=og content=no>", ["http://host.example/dir/x"]),
        ("<link rel='x image_src' href=a><link rel=icon href=no>", ["http://host.example/dir/a"]),
        ("<img src=a><base href='/b/'><base href='/no/'>", ["http://host.example/b/a"]),
        ("<img src=a?x=1&amp;y=2&copy=3&lt;&#x41;>", ["http://host.example/dir/a?x=1&y=2&copy=3%3CA"]),
        ("<img src='a?x&param=1&note=2&gt0=3'>", ["http://host.example/dir/a?x&param=1&note=2&gt0=3"]),
        ("<img src='a?x&amp;=1&amp=2'>", ["http://host.example/dir/a?x&=1&amp=2"]),
        (
            "<noscript><img src=a></noscript><template><img src=b>",
            ["http://host.example/dir/" + c for c in "ab"],
        ),
        (
            "<!-- <img src=no> --><img src=a><!--> <img src=b> <!-- <img src=no>",
            ["http://host.example/dir/" + c for c in "ab"],
        ),
        (
            "<script>'<img src=no>'</script><style><img src=no></style><img src=a>",
            ["http://host.example/dir/a"],
        ),
        ("<script><!--<script></script><img src=no>--></script><img src=a>", ["http://host.example/dir/a"]),
        ("<svg><style/><title/><image href=no></svg><img src=a>", ["http://host.example/dir/a"]),
        ("<img src=data:image/png,x><img src='javascript:x'><img src><img src='#a'><img>", []),
        ("<p title='<img src=no>' <img src=b><img src=a", []),
        ("< img src=no><img src=a></ <img src=no>", ["http://host.example/dir/a"]),
        ("<plaintext><img src=no>", []),
        ("<!-- x --!><img src=a>", ["http://host.example/dir/a"]),
    ],
)
def test_images_of_a_page(html, urls):
    assert found(html) == urls


@pytest.mark.parametrize(
    ("html", "name"),
    [
        ("<img data-src='{{item.image}}' src=real.jpg><img src='${img}'><img src='<%= x %>'>", "real.jpg"),
        ("<img data-src='//cdn.example/a_{width}x.jpg' src=real.jpg>", "real.jpg"),
        ("<img srcset='{{a}} 2x, real.jpg 1x, [b] 3x'>", "real.jpg"),
        ("<img src=real.jpg data-url=https://example.org/article.html>", "real.jpg"),
        ("<img src=real.jpg data-url=https://example.org/article>", "real.jpg"),
        (
            "<img src=small.jpg data-url=https://example.org/article/real.jpg?w=1>",
            "https://example.org/article/real.jpg?w=1",
        ),
        ("<img data-image=/pictures/real>", "/pictures/real"),
        ("<img src=real.jpg data-image=12345>", "real.jpg"),
        ("<img src=real.jpg data-original=true data-lazy=1 data-src=#>", "real.jpg"),
        ('<img src=real.jpg data-lazy=\'{"src":"/x.jpg"}\' data-image=\'["/x.jpg"]\'>', "real.jpg"),
        ("<img src=small.jpg data-large_image=big.jpg data-lazy-src=real.jpg>", "real.jpg"),
        ("<img src=small.jpg data-src=/image/real>", "/image/real"),
        ("<img src=blank.gif data-src=page.php data-original=real.png#x>", "real.png"),
        ("<img srcset='blank.gif 1w' src=wait.gif data-src=mid.jpg data-srcset='real.jpg 800w'>", "real.jpg"),
        ("<img srcset='blank.gif 1w' src=real.jpg>", "real.jpg"),
        ("<img srcset='wait.gif' data-srcset='real.jpg'>", "real.jpg"),
        ("<img srcset='wait.gif' data-src='real.jpg'>", "real.jpg"),
        ("<img srcset='real.jpg 2x' data-src='small.jpg'>", "real.jpg"),
        (
            "<picture><source type=image/avif srcset=a.avif><source srcset='real.jpg 2x'><img src=data:,>",
            "real.jpg",
        ),
        ("<picture><source data-srcset=a.webp><img data-src=real.jpg src=wait.gif></picture>", "real.jpg"),
        ("<picture><source srcset=a></picture><picture><img src=real.jpg>", "real.jpg"),
        (
            "<amp-img src=real.jpg width=1 height=1><noscript><img src=real.jpg></noscript></amp-img>",
            "real.jpg",
        ),
    ],
)
def test_one_image_is_one_link_and_no_junk_displaces_it(html, name):
    assert found(html) == [resolve(name, PAGE)]


def test_a_page_has_ten_thousand_links_at_most():
    html = "".join(f"<img src={number}.jpg>" * 2 for number in range(10_100))
    assert found(html) == [resolve(f"{number}.jpg", PAGE) for number in range(10_000)]


def test_of_the_texts_of_an_address_the_first_that_says_something_is_kept():
    html = "<img src=a alt=' '><img src=./a alt=one><noscript><img src=a alt=two></noscript>"
    assert page_links(html.encode(), PAGE).links == (Link(resolve("a", PAGE), "one"),)


def test_alt_is_one_line_of_plain_text_and_each_address_comes_once():
    html = "<img src=a alt=' two\n words\u202e '><img src=a alt=other><img src=b>"
    links = page_links(html.encode(), PAGE).links
    assert links == (Link(resolve("a", PAGE), "two words"), Link(resolve("b", PAGE), ""))


@pytest.mark.parametrize(
    ("page", "charset"),
    [
        ("<meta charset=windows-1251><img src=x alt='Привет'>".encode("cp1251"), None),
        ("<img src=x alt='Привет'>".encode("cp1251"), "windows-1251"),
        ("<img src=x alt='Привет'>".encode(), None),
        ("<img src=x alt='Привет'>".encode(), "unicode_escape"),
        ("<meta charset=base64><img src=x alt='Привет'>".encode(), "no such"),
        (b"\xff\xfe" + "<img src=x alt='Привет'>".encode("utf-16-le"), "ascii"),
    ],
)
def test_encoding_is_that_of_the_mark_the_header_or_the_page(page, charset):
    assert page_links(page, PAGE, charset=charset).links == (Link(resolve("x", PAGE), "Привет"),)


def test_a_page_without_any_encoding_is_western():
    assert page_links(b"<img src=x alt=caf\xe9>", PAGE).links[0].alt == "café"


@pytest.mark.parametrize(
    ("directives", "out"),
    [
        ("noai", True),
        ("index, NoImageIndex", True),
        ("max-image-preview:large, noimageai", True),
        ("noindex, nofollow", False),
        ("otherbot: noai", False),
        ("otherbot: noindex, noai", False),
        ("otherbot: noindex, seer-ingest: noai", True),
        ("*: noai", True),
        ("none", False),
        ("noaix", False),
        ("", False),
    ],
)
def test_opt_outs(directives, out):
    outs = {OptOut.X_ROBOTS_TAG} if out else set()
    assert page_opt_outs(lambda name: [directives] if name == "X-Robots-Tag" else []) == outs
    html = f"<meta NAME=Robots content='{directives}'><img src=a>"
    assert page_links(html.encode(), PAGE).opt_outs == outs


SOUP = st.lists(
    st.sampled_from(
        [
            "<img ",
            "<img src=a",
            "<source srcset='b 2x'",
            "<p ",
            '<a href="',
            "<title>",
            "</title>",
            "<script>",
            "</script>",
            "<!--",
            "-->",
            "--!>",
            "<!-",
            "<!x",
            "<?",
            "</",
            "</p>",
            "</ >",
            "<textarea>",
            "</textarea>",
            "<style>",
            "</style>",
            "<noscript>",
            "</noscript>",
            "'",
            '"',
            "=",
            "/",
            ">",
            "/>",
            " ",
            "\n",
            "x",
            "src=c",
            "alt='<img src=d>'",
            "&amp;",
            "&copy",
            ";",
            "#",
            "é",
            "<",
            "&#x41;",
            "</TITLE ",
            "</scripts>",
            "<meta property=og:image content=e>",
            "<picture>",
            "</picture ",
            "<amp-img src=f>",
        ]
    ),
    max_size=25,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(SOUP)
def test_tags_are_those_of_an_independent_parser(soup):
    # Its tokenizer alone, for a tree drops and moves tags.
    tokens = html5lib._tokenizer.HTMLTokenizer(soup)
    theirs = []
    states = {"title": "rcdata", "textarea": "rcdata", "style": "rawtext", "script": "scriptData"}
    for token in tokens:
        if token["type"] == html5lib.constants.tokenTypes["StartTag"]:
            if token["name"] in states:
                tokens.state = getattr(tokens, states[token["name"]] + "State")
            if token["name"] in ("img", "amp-img", "picture", "source", "meta"):
                theirs.append((token["name"], dict(token["data"])))
        elif token["type"] == html5lib.constants.tokenTypes["EndTag"] and token["name"] == "picture":
            theirs.append(("/picture", {}))
    assert [(name, attributes(text)) for name, text in tags(soup)] == theirs


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | SOUP.map(str.encode), st.text(max_size=10) | st.none())
def test_D4_no_bytes_raise(page, charset):
    for link in page_links(page, PAGE, charset=charset).links:
        assert resolve(link.url) == link.url
        link.alt.encode()


@pytest.mark.parametrize(
    "unit",
    [
        b"<div>",
        b"<b><p>",
        b"a=",
        b"<a b='",
        b"<a b='\">",
        b"<!--",
        b"<script>",
        b"<!--<script>",
        b"<svg>",
        b"<",
    ],
)
@pytest.mark.parametrize("start", [b"", b"<img ", b"<img srcset='"])
def test_D4_time_is_in_proportion_to_the_page(start, unit):
    size = LONGEST_PAGE // 16
    started = time.process_time()
    page_links((start + unit * (size // len(unit)))[:size], PAGE)
    # Half a megabyte takes a tenth of a second or less; what goes with the square, minutes.
    assert time.process_time() - started < 3


def test_D4_unclosed_formatting_does_not_grow():
    html = b"<p>" + b"".join(b"<b id=%d>" % number for number in range(2000)) + b"</p>" + b"<p>x" * 4000
    assert list(tags(decode_page(html))) == []
