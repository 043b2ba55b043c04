"""One vocabulary of opt-outs, for what is fetched, what is archived, pages and robots.txt."""

import time

import pytest
from archives import archive, response
from yarl import URL

from ingest.links.page import page_links
from ingest.problem import PROBLEMS
from ingest.sources.warc import WarcSource
from ingest.web.opt_outs import ALL, OptOut, image_opt_out
from ingest.web.robots_txt import rules

# A header, what it says, and whether that keeps an image from us, and images of a page.
SAID = [
    ("X-Robots-Tag", "noai", True, True),
    ("X-Robots-Tag", "noindex", True, False),
    ("X-Robots-Tag", "otherbot: noai", False, False),
    ("TDM-Reservation", "1", True, True),
    ("TDM-Reservation", '"1"', True, True),
    ("TDM-Reservation", "0", False, False),
    ("TDM-Reservation", "10", False, False),
    ("Content-Signal", "search=yes, ai-train=no", True, True),
    ("Content-Signal", "AI-Train = No", True, True),
    ("Content-Signal", "ai-train=yes", False, False),
    ("Content-Signal", "ai-input=no", False, False),
    ("Content-Signal", "train-ai=n", False, False),
    ("Content-Usage", "train-ai=n", True, True),
    ("Content-Usage", "search=y, train-ai=n;x=y", True, True),
    ("Content-Usage", "ai=n", True, True),
    ("Content-Usage", "bots=n, train-ai=y", False, False),
    ("Content-Usage", "train-ai=y", False, False),
    ("Content-Usage", "search=n", False, False),
    ("Content-Usage", "train-ai", False, False),
]


def reason_of(header: str) -> str:
    return {each.header: each.value for each in OptOut}[header]


@pytest.mark.parametrize(("header", "value", "image", "page"), SAID)
def test_a_header_an_archived_answer_and_a_page_say_the_same(header, value, image, page, tmp_path):
    def said(name):
        return [value] if name == header else []

    reason = reason_of(header)
    assert image_opt_out(said) == (reason if image else None)
    assert image_opt_out(said, ALL - {reason}) is None
    gif = b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"
    stored = response("http://a/1", gif, "image/gif", headers=f"{header.lower()}: {value}\r\n")
    path = archive(tmp_path / "w.warc.gz", [stored])
    (item,) = WarcSource(path).items()
    assert item.problem == (reason if image else "")
    assert not image or PROBLEMS[item.problem].status == "rejected"
    (item,) = WarcSource(path, heeded=ALL - {reason}).items()
    assert item.problem == ""
    for name in {header, "robots" if header == "X-Robots-Tag" else header, "Seer-Ingest"}:
        html = f"<meta name={name} content='{value}'><img src=a>".encode()
        outs = {reason} if page else set()
        if name != "Seer-Ingest" or header == "X-Robots-Tag":
            assert page_links(html, "http://a/").opt_outs == outs


@pytest.mark.parametrize("name", ["pinterest", "googlebot", "description"])
def test_what_a_page_asks_of_others_is_not_asked_of_us(name):
    page = page_links(f"<meta name={name} content='nopin, noai'><img src=/n.jpg>".encode(), "http://a/")
    assert (page.opt_outs, [link.url for link in page.links]) == (set(), ["http://a/n.jpg"])


CLOSED = "User-agent: *\nContent-Signal: search=yes, ai-train=no\nAllow: /\n"
USAGE = "User-agent: *\nAllow: /\nContent-Usage: train-ai=n\nContent-Usage: /open/ train-ai=y\n"


@pytest.mark.parametrize(
    ("text", "path", "reason"),
    [
        (CLOSED, "/a.jpg", "content_signal"),
        (CLOSED.lower(), "/a.jpg", "content_signal"),
        (CLOSED.replace("ai-train=no", "ai-train=yes"), "/a.jpg", None),
        (CLOSED.replace("Allow", "Disallow"), "/a.jpg", "content_signal"),
        (CLOSED.replace("*", "otherbot"), "/a.jpg", None),
        (CLOSED + "\nUser-agent: seer-ingest\nAllow: /\n", "/a.jpg", None),
        ("User-agent: seer-ingest\nAllow: /\n\n" + CLOSED, "/a.jpg", None),
        (
            "User-agent: seer-ingest\nContent-Usage: train-ai=n # ours\n\nUser-agent: *\n",
            "/",
            "content_usage",
        ),
        (USAGE, "/a.jpg", "content_usage"),
        (USAGE, "/open/a.jpg", None),
        ("User-agent: *\nContent-Signal: /art/* ai-train=no\n", "/art/a.jpg", "content_signal"),
        ("User-agent: *\nContent-Signal: /art/* ai-train=no\n", "/a.jpg", None),
        ("User-agent: *\n# Content-Signal: ai-train=no\nDisallow: /b\n", "/a.jpg", None),
    ],
)
def test_robots_txt_says_so_for_a_robot_and_a_path(text, path, reason):
    url = URL(f"http://example.org{path}")
    assert rules(text).opt_out(url, ALL) == reason
    assert reason is None or rules(text).opt_out(url, ALL - {reason}) is None


@pytest.mark.parametrize("header", ["X-Robots-Tag", "TDM-Reservation", "Content-Signal", "Content-Usage"])
def test_D4_a_header_too_long_to_be_read_in_a_moment_opts_out(header):
    values = ["," * 32_000] * 8
    started = time.thread_time()
    assert image_opt_out(lambda name: values if name == header else []) is not None
    assert image_opt_out(lambda name: ["all"] if name == header else []) is None
    assert time.thread_time() - started < 0.01
