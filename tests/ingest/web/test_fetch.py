"""Fetching from a server that does everything wrong, and from one that does it right."""

import gzip
import random
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hostile_server import ALLOWED, GOOD, REBINDING, HostileServer

from cluster.errors import UserError
from ingest.web.errands import Fetched
from ingest.web.fetcher import Fetcher
from ingest.web.settings import FetchSettings

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from peak_memory import PeakMemory

SETTINGS = FetchSettings(
    contact="https://example.org/crawl",
    allow_private=ALLOWED,
    deadline=1.5,
    tries=1,
    max_bytes=4 << 20,
)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[HostileServer]:
    with HostileServer(tmp_path) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(server.ca_file))
        yield server


def fetched(urls, settings=SETTINGS, **options):
    """Outcome by URL."""
    with Fetcher(settings, **options) as fetcher:
        return dict(fetcher.run((url, url) for url in urls))


def reason(outcome) -> str:
    return "" if isinstance(outcome, Fetched) else outcome.reason


@pytest.mark.slow
def test_D4_every_hostile_url_ends_with_its_reason_and_nothing_private_is_visited(server):
    expected = server.cases()
    attempts = replace(SETTINGS, tries=3)  # one may be too slow on a machine that does much else
    before = psutil.Process().memory_info().rss
    started = time.monotonic()
    outcomes = fetched(expected, attempts)
    assert {url: reason(outcome) for url, outcome in outcomes.items()} == expected
    assert time.monotonic() - started < 30  # three times the deadline and the pauses between, twice over
    assert psutil.Process().memory_info().rss - before < 200 << 20
    assert server.trespasses == 0
    bodies = [outcome.data for outcome in outcomes.values() if isinstance(outcome, Fetched)]
    assert set(bodies) == {GOOD, b""}


def test_D4_names_that_lead_to_private_addresses_are_refused_whole(server):
    expected = server.name_cases()
    outcomes = fetched(expected, nameservers=[server.nameserver])
    assert {url: reason(outcome) for url, outcome in outcomes.items()} == expected
    assert server.trespasses == 0


def test_D4_a_name_is_asked_for_once_and_its_checked_address_is_kept(server):
    """Two questions are one lookup, A and AAAA: a name server that changes its mind is not heard."""
    urls = [f"http://{REBINDING}:{server.port}/good?{number}" for number in range(6)]
    outcomes = fetched(urls, nameservers=[server.nameserver])
    assert {reason(outcome) for outcome in outcomes.values()} == {""}
    assert server.name_questions[REBINDING] == 2
    assert server.trespasses == 0


def test_D4_names_are_asked_for_as_they_are_written(server, monkeypatch):
    """Not in the domains of this machine, where `intranet.com` may be somebody else's."""
    monkeypatch.setenv("LOCALDOMAIN", "test corp.test")
    names = ("unknown.test", "nowhere", "good")
    urls = [f"http://{name}:{server.port}/good" for name in names]
    outcomes = fetched(urls, nameservers=[server.nameserver])
    assert list(map(reason, map(outcomes.get, urls))) == ["dns_not_found"] * 3
    assert set(server.name_questions) == set(names)


def test_D4_a_name_without_a_dot_is_asked_for_where_private_networks_are_allowed_and_leads_there(server):
    single = f"http://single:{server.port}/good"
    assert reason(fetched([single], nameservers=[server.nameserver])[single]) == ""
    server.name_questions.clear()
    nothing = replace(SETTINGS, allow_private=())
    assert reason(fetched([single], nothing, nameservers=[server.nameserver])[single]) == "private_name"
    assert not server.name_questions


def test_D4_a_denied_network_is_not_asked(server):
    urls = [server.url("good"), server.url("redirected"), server.url("gzip")]
    denied = replace(SETTINGS, deny_network=(f"{urls[0].split('/')[2].partition(':')[0]}/32",))
    outcomes = fetched(urls, denied)
    assert [reason(outcomes[url]) for url in urls] == ["private_address", "private_address", ""]
    assert server.visits["good"] == 0


def test_names_of_the_hosts_file_are_known(server):
    url = f"http://localhost:{server.port}/good"
    local = replace(SETTINGS, allow_private=("127.0.0.0/8", "::1/128"))
    assert reason(fetched([url], local)[url]) == ""
    assert reason(fetched([url])[url]) == "private_address"


def test_what_is_no_url_gets_a_row_without_being_asked():
    assert {
        url: reason(outcome) for url, outcome in fetched(["ftp://a/b", "", "http://[x", "data:,x"]).items()
    } == {
        "ftp://a/b": "not_http_url",
        "": "not_http_url",
        "http://[x": "bad_url",
        "data:,x": "not_http_url",
    }


def test_requests_say_who_asks_and_carry_nothing_else(server):
    url = server.url("good").replace("http://", "http://user:secret@") + "#part"
    fetched([url])
    address, request = server.requests[-1]
    lines = request.lower().split("\r\n")
    assert request.startswith("GET /good HTTP/1.1\r\n")
    assert any(
        line.startswith("user-agent: seer-ingest/") and "(+https://example.org/crawl)" in line
        for line in lines
    )
    assert not any(line.startswith(("cookie", "referer", "authorization")) for line in lines)
    assert f"host: {address}:{server.port}" in lines


def test_a_contact_that_could_forge_headers_is_refused():
    for contact in ("me@example.org\r\nX-Evil: 1", "nobody", "a@b) (c"):
        with pytest.raises(UserError, match="contact"):
            Fetcher(replace(SETTINGS, contact=contact))


@pytest.mark.slow
def test_retry_after_holds_back_the_host_and_not_only_the_url(server):
    """Of two URLs of one host, the second waits too, though it was never refused."""
    patient = replace(SETTINGS, tries=2, per_host=1, robots=False)
    later = server.url("later")
    started = time.monotonic()
    outcomes = fetched([later, later + "?b"], patient)
    assert {reason(outcome) for outcome in outcomes.values()} == {""}
    assert time.monotonic() - started >= 1.0
    assert server.visits["later"] == 3


def test_without_robots_nobody_is_asked_for_them(server):
    names = ("robots_all", "robots_tag", "tdm", "signal", "usage", "robots_signal")
    urls = [server.url(name) for name in names]
    bold = replace(SETTINGS, robots=False, heeded=frozenset())
    assert {reason(outcome) for outcome in fetched(urls, bold).values()} == {""}
    assert not any("/robots.txt" in request for _, request in server.requests)


def test_robots_txt_is_asked_for_once_per_origin(server):
    fetched([f"{server.url('good')}?{number}" for number in range(20)])
    assert sum("/robots.txt" in request for _, request in server.requests) == 1


@pytest.mark.slow
def test_a_dead_host_does_not_hold_up_the_others(server):
    with socket.socket() as unused:
        unused.bind(("127.0.1.250", 0))
        dead = [f"http://127.0.1.250:{unused.getsockname()[1]}/{number}" for number in range(300)]
        slow = [f"{server.url('nothing')}?{number}" for number in range(100)]
        good = [f"{server.url('good')}?{number}" for number in range(100)]
        started = time.monotonic()
        quick = replace(SETTINGS, robots=False, deadline=0.5)
        outcomes = fetched([*dead, *slow, *good], quick)
    assert time.monotonic() - started < 5
    assert {reason(outcomes[url]) for url in good} == {""}
    assert {reason(outcomes[url]) for url in dead} == {"connect_failed", "host_unreachable"}
    assert {reason(outcomes[url]) for url in slow} == {"deadline", "host_unreachable"}
    assert all(outcomes[url].retryable for url in dead + slow)


def test_reads_no_further_ahead_than_the_window_and_lets_the_consumer_set_the_pace(server):
    read = 0

    def requests():
        nonlocal read
        for number in range(1000):
            read += 1
            yield number, f"{server.url('good')}?{number}"

    with Fetcher(replace(SETTINGS, robots=False), window=100) as fetcher:
        for taken, _ in enumerate(fetcher.run(requests()), 1):
            assert read - taken <= 100
    assert taken == 1000


@pytest.mark.slow
def test_requests_that_are_not_there_yet_are_asked_for_again(server):
    read = taken = 0

    def requests():
        nonlocal read
        for number in range(100):
            while read - taken >= 10 or (number == 50 and time.monotonic() < begun + 1):
                yield None  # also while nothing is under way
            read += 1
            yield number, f"{server.url('good')}?{number}"

    begun = time.monotonic()
    with Fetcher(replace(SETTINGS, robots=False)) as fetcher:
        for _ in fetcher.run(requests()):
            taken += 1
            assert read - taken <= 10
    assert taken == 100


def test_leaving_early_and_closing_leaves_no_thread_and_no_socket(server):
    fetched([server.url("good")])  # c-ares keeps one thread per process, from its first use on
    process = psutil.Process()
    threads = set(threading.enumerate())

    def sockets():
        """The client's; the server's own ends are in this process too."""
        return [each for each in process.net_connections() if each.raddr and each.raddr.port == server.port]

    urls = [
        f"{server.url(name)}?{number}" for number in range(50) for name in ("good", "slow_body", "nothing")
    ]
    with Fetcher(replace(SETTINGS, robots=False)) as fetcher:
        run = fetcher.run((url, url) for url in urls)
        assert reason(next(run)[1]) == ""
        run.close()
        assert [reason(outcome) for _, outcome in fetcher.run([(0, server.url("gzip"))])] == [""]
        unfinished = fetcher.run((url, url) for url in urls)
        next(unfinished)
    assert set(threading.enumerate()) <= threads
    assert sockets() == []


@pytest.mark.slow
def test_D4_bodies_that_unfold_and_then_stall_are_not_all_in_memory(server):
    rough = random.Random(0)
    unfolded = b"".join(bytes(2000) + rough.randbytes(6) for _ in range(8_000))
    body = gzip.compress(unfolded)
    reply = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    stalled = threading.Event()

    class Stalls(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(10_000)
            self.request.sendall(reply + body[:-20])
            stalled.wait()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("", 0), Stalls) as stalling, PeakMemory(kind="rss") as memory:
        threading.Thread(target=stalling.serve_forever, args=(0.05,), daemon=True).start()
        tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
        before = sum(process.memory_info().rss for process in tree)
        urls = [f"http://127.0.1.{n}:{stalling.server_address[1]}/" for n in range(1, 25)]
        outcomes = fetched(urls, replace(SETTINGS, deadline=0.5, max_bytes=32 << 20, robots=False))
        stalled.set()
        stalling.shutdown()
    assert {reason(outcome) for outcome in outcomes.values()} == {"deadline"}
    # Eight of them whole, 16 MB each, and 1 MB of the others; all would be 384 MB.
    assert memory.peak - before < 250 << 20


def test_a_redirect_is_an_answer(server):
    class RedirectsOrHangsUp(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            number = int(self.rfile.readline().split()[1].rpartition(b"/")[2])
            if number % 2:
                place = f"{server.url('good')}?{number}"
                self.wfile.write(f"HTTP/1.1 302 Found\r\nLocation: {place}\r\n\r\n".encode())

    with socketserver.TCPServer(("", 0), RedirectsOrHangsUp) as other:
        threading.Thread(target=other.serve_forever, args=(0.05,), daemon=True).start()
        urls = [f"http://127.0.1.200:{other.server_address[1]}/{number}" for number in range(30)]
        outcomes = fetched(urls, replace(SETTINGS, robots=False, per_host=1))
        other.shutdown()
    # Never eight failures in a row, after which a host would be left alone.
    assert [reason(outcomes[url]) for url in urls] == ["reset", ""] * 15
