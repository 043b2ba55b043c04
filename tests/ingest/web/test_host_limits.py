"""--host-limits: hosts are asked as a file says, and what it cannot say is told with its line."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from test_politeness import SETTINGS, CountingServer, image, reasons, robots

from cluster.errors import UserError
from ingest.web.host_limits import HostLimit, HostLimits, read_host_limits

FILE = """\
# host              connections  requests per second

Images.example.org   16           100   # as agreed
*.example.org\t-\t0.5
*.cdn.example.org    4
bücher.example       3            -
[2001:db8::1]        5
"""


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "limits.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_host_has_the_limits_of_its_own_line_then_of_the_longest_name_above_it(tmp_path):
    limits = HostLimits(read_host_limits(written(tmp_path, FILE), per_address=32), connections=2, rate=10.0)
    found = {
        host: (limits.connections(host), limits.interval(host))
        for host in (
            "images.example.org",
            "example.org",
            "other.example.org",
            "a.b.cdn.example.org",
            "cdn.example.org",
            "xn--bcher-kva.example",
            "2001:db8::1",
            "notexample.org",
            "org",
        )
    }
    assert found == {
        "images.example.org": (16, 0.01),
        "example.org": (2, 0.1),  # *. is of those below
        "other.example.org": (2, 2.0),
        "a.b.cdn.example.org": (4, 0.1),
        "cdn.example.org": (2, 2.0),
        "xn--bcher-kva.example": (3, 0.1),
        "2001:db8::1": (5, 0.1),
        "notexample.org": (2, 0.1),
        "org": (2, 0.1),
    }
    assert HostLimits((), connections=1, rate=None).interval("a.b") == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.b\n", "line 1: give the host, its connections"),
        ("\n# no\na.b 1 2 3\n", "line 3: give the host, its connections"),
        ("a.b 2.5\n", "line 1: 2.5 connections are not a whole number"),
        ("a.b 0\n", "line 1: 0 is no number from 0.001 on"),
        ("a.b 2 0.0005\n", "line 1: 0.0005 is no number from 0.001 on"),
        ("a.b 2 nan\n", "line 1: nan is no number"),
        ("a.b 2 inf\n", "line 1: inf is no number"),
        ("a.b many\n", "line 1: many is no number"),
        ("a.b 33\n", "line 1: 33 connections are more than an address may have: give at most 32, or "
         "--per-address 33, too"),
        ("http://a.b/ 2\n", "line 1: http://a.b/ is no host's name"),
        ("a.b:80 2\n", "line 1: a.b:80 is no host's name"),
        ("a.*.b 2\n", "line 1: a.*.b is no host's name"),
        ("me@a.b 2\n", "line 1: me@a.b is no host's name"),
        ("a.b 2\nA.b 3\n", "line 2: a.b is there twice"),
        (b"\xff 2\n", "is no text in UTF-8"),
    ],
)  # fmt: skip
def test_a_line_that_says_nothing_is_told_with_its_number(tmp_path, text, words):
    with pytest.raises(UserError, match=r"--host-limits .*limits\.txt") as told:
        read_host_limits(written(tmp_path, text), per_address=32)
    assert words in str(told.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_host_limits(tmp_path / "none", per_address=32)


@pytest.mark.slow
def test_hosts_are_asked_as_their_limits_say_and_others_as_ever():
    limits = (HostLimit(name="127.0.1.1", connections=5), HostLimit(name="127.0.1.2", rate=20.0))
    with CountingServer(image, seconds=0.02).serving() as server:
        urls = [f"http://127.0.1.{host}:{server.port}/{host}/{n}" for host in (1, 2, 3) for n in range(20)]
        assert reasons(urls, replace(SETTINGS, host_limits=limits)) == {"": 60}
    assert server.most["127.0.1.1", "1"] == 5
    assert server.most["127.0.1.3", "3"] == 2
    times = [time for time, _ in server.times["127.0.1.2"]]
    assert times[-1] - times[0] > 0.9 * 19 / 20  # one by one they may come late on a busy machine


def test_a_crawl_delay_is_kept_by_a_host_that_may_be_asked_more():
    limits = (HostLimit(name="127.0.1.1", connections=5, rate=1000.0),)
    settings = replace(SETTINGS, robots=True, host_limits=limits)
    reply = robots("User-agent: *\nCrawl-delay: 0.2\n")
    with CountingServer(reply).serving() as server:
        assert reasons([f"http://127.0.1.1:{server.port}/{n}" for n in range(4)], settings) == {"": 4}
    times = [time for time, path in server.times["127.0.1.1"] if path != "/robots.txt"]
    assert min(after - before for before, after in pairwise(times)) > 0.15
