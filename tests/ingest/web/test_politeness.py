"""What a site and an address are spared, whatever other sites say: real servers count how they are asked."""

import socketserver
import ssl
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise

import psutil
import pytest
import trustme
from hostile_server import ALLOWED, CROWD, CROWDED, HostileServer
from yarl import URL

from ingest.web.errands import Fetched
from ingest.web.fetcher import Fetcher
from ingest.web.robots_txt import rules
from ingest.web.settings import FetchSettings

SETTINGS = FetchSettings(
    contact="https://example.org/crawl", allow_private=ALLOWED, tries=1, robots=False, deadline=10
)
OK = "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n"
Reply = Callable[[str, str], bytes]


class CountingServer:
    """Answers `reply(host, path)`, after a while, on all addresses of this machine.

    Attributes:
        most: requests under way at a time, by address and path's first part.
        times: when each path was asked, by address.
    """

    def __init__(self, reply: Reply, *, seconds: float = 0.0) -> None:
        self.most: Counter[tuple[str, str]] = Counter()
        self.times: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)
        now: Counter[tuple[str, str]] = Counter()
        lock = threading.Lock()
        owner = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                address = self.request.getsockname()[0]
                while first := self.rfile.readline():
                    headers = list(iter(lambda: self.rfile.readline().strip(), b""))
                    host = next(line[5:].strip() for line in headers if line.lower().startswith(b"host:"))
                    path = first.split()[1].decode()
                    key = address, path.split("/")[1]
                    with lock:
                        now[key] += 1
                        owner.most[key] = max(owner.most[key], now[key])
                        owner.times[address].append((time.monotonic(), path))
                    time.sleep(seconds)
                    with lock:
                        now[key] -= 1
                    self.wfile.write(reply(host.decode().partition(":")[0], path))

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 512

            def handle_error(self, *words: object) -> None:
                """A client may hang up."""

        self._server = Server(("", 0), Handler)
        self.port = self._server.server_address[1]

    @contextmanager
    def serving(self) -> Iterator["CountingServer"]:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        yield self
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def names(tmp_path) -> Iterator[str]:
    """A name server that knows one address of many names."""
    with HostileServer(tmp_path) as server:
        yield server.nameserver


def image(host: str, path: str) -> bytes:
    return OK.format(3).encode() + b"abc"


def robots(text: str) -> Reply:
    """Of a site that says this in its robots.txt."""
    reply = (OK.format(len(text)) + text).encode()
    return lambda host, path: reply if path == "/robots.txt" else image(host, path)


def reasons(urls: list[str], settings: FetchSettings = SETTINGS, **options: object) -> Counter[str]:
    with Fetcher(settings, **options) as fetcher:
        outcomes = [outcome for _, outcome in fetcher.run((url, url) for url in urls)]
    return Counter("" if isinstance(outcome, Fetched) else outcome.reason for outcome in outcomes)


def test_many_names_of_one_address_are_asked_by_few_at_a_time(names):
    with CountingServer(image, seconds=0.05).serving() as server:
        urls = [f"http://{n}.{CROWD}:{server.port}/image/{n}" for n in range(150)]
        assert reasons(urls, replace(SETTINGS, per_address=10), nameservers=[names]) == {"": 150}
    assert server.most[CROWDED, "image"] == 10


@pytest.mark.slow
def test_a_crawl_delay_is_kept_by_the_address_of_those_who_ask_for_it(names):
    delay = 0.2
    slow, quick = robots(f"User-agent: *\nCrawl-delay: {delay}"), robots("")

    def reply(host: str, path: str) -> bytes:
        return (slow if host.startswith("slow") else quick)(host, path)

    with CountingServer(reply).serving() as server:
        urls = [f"http://slow{n}.{CROWD}:{server.port}/slow/{n}" for n in range(5)]
        urls += [f"http://quick{n}.{CROWD}:{server.port}/quick/{n}" for n in range(20)]
        assert reasons(urls, replace(SETTINGS, robots=True), nameservers=[names]) == {"": 25}
    asked = {kind: [at for at, path in server.times[CROWDED] if kind in path] for kind in ("slow", "quick")}
    gaps = [after - before for before, after in pairwise(asked["slow"])]
    assert len(gaps) == 4 and min(gaps) > 0.9 * delay
    assert asked["quick"][-1] < asked["slow"][2]


def test_redirects_of_robots_txt_queue_where_they_lead():
    victim = "127.0.1.251"

    def reply(host: str, path: str) -> bytes:
        if path == "/robots.txt" and host != victim:
            return (
                f"HTTP/1.1 302 Found\r\nLocation: http://{victim}:{server.port}/rules/{host}\r\n"
                "Content-Length: 0\r\n\r\n"
            ).encode()
        return image(host, path)

    with CountingServer(reply, seconds=0.02).serving() as server:
        urls = [f"http://127.0.1.{n}:{server.port}/image" for n in range(1, 61)]
        assert reasons(urls, replace(SETTINGS, robots=True)) == {"": 60}
    assert server.most[victim, "rules"] == SETTINGS.per_host
    assert len(server.times[victim]) == 60


def test_a_question_for_robots_txt_is_a_request_of_its_host_like_any_other():
    with CountingServer(robots("User-agent: *\nDisallow: /no")).serving() as server:
        urls = [f"http://127.0.1.1:{server.port}/{name}" for name in ("a", "no", "b")]
        rated = replace(SETTINGS, robots=True, per_host_rate=5.0)
        assert reasons(urls, rated) == {"": 2, "robots_disallowed": 1}
    times = [at for at, _ in server.times["127.0.1.1"]]
    assert [path for _, path in server.times["127.0.1.1"]] == ["/robots.txt", "/a", "/b"]
    assert min(after - before for before, after in pairwise(times)) > 0.18


def test_who_waits_for_a_robots_txt_that_fails_gets_a_row_and_asks_again():
    answers = iter([b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"] * 2)
    there = robots("User-agent: *\nDisallow: /no")

    def reply(host: str, path: str) -> bytes:
        return next(answers, there(host, path)) if path == "/robots.txt" else image(host, path)

    with CountingServer(reply).serving() as server:
        urls = [f"http://127.0.1.1:{server.port}/{n}" for n in range(10)]
        # Two of them with each of the two failures.
        assert reasons(urls, replace(SETTINGS, robots=True)) == {"": 6, "robots_unreachable": 4}


@pytest.mark.parametrize("host", ["127.0.1.{}", "{}." + CROWD])
def test_connections_that_nothing_waits_for_are_bounded_in_all_and_at_an_address(monkeypatch, names, host):
    monkeypatch.setattr("ingest.web.connector._MOST_CONNECTIONS", 10 if host[0] == "1" else 100)
    # Each host has a connection of its own; and nothing more is asked of them.
    with CountingServer(robots("User-agent: *\nDisallow: /")).serving() as server:
        urls = [f"http://{host.format(n)}:{server.port}/" for n in range(1, 61)]
        few = replace(SETTINGS, robots=True, connections=4, per_address=10)
        with Fetcher(few, nameservers=[names]) as fetcher:
            assert len(list(fetcher.run((url, url) for url in urls))) == 60
            mine = [each for each in psutil.Process().net_connections() if each.raddr]
            assert sum(each.raddr.port == server.port for each in mine) <= 10 + few.connections


@pytest.mark.slow
def test_D4_slow_bodies_cost_their_own_time_and_not_that_of_others():
    large = 5 << 18
    done = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            slow = b"/slow" in self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            self.wfile.write(OK.format(large).encode() + bytes(large - slow))
            if slow:
                done.wait()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        port = server.server_address[1]
        urls = [f"http://127.0.1.{n}:{port}/slow" for n in range(1, 21)]
        urls += [f"http://127.0.1.{n}:{port}/good" for n in range(21, 41)]
        with Fetcher(replace(SETTINGS, deadline=2)) as fetcher:
            outcomes = fetcher.run((url, url) for url in urls)
            first = [next(outcomes) for _ in range(20)]
            assert {url.rpartition("/")[2] for url, _ in first} == {"good"}
            assert {outcome.reason for _, outcome in outcomes} == {"deadline"}
        done.set()
        server.shutdown()


def test_D4_a_connection_that_is_given_up_is_closed_whatever_the_server_does(tmp_path, monkeypatch):
    """TLS waits half a minute for the other side to agree to an end."""
    done = threading.Event()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(CROWDED).configure_cert(context)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            stream = context.wrap_socket(self.request, server_side=True)
            kind = stream.recv(10_000).split(b"/")[1]
            stream.sendall(OK.format(1 << 30).encode())
            with suppress(OSError):
                while kind != b"silent":
                    stream.sendall(bytes(1 if kind == b"drips" else 100_000))
                    time.sleep(0.05 * (kind == b"drips"))
            done.wait()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    def connections() -> int:
        mine = (each.raddr for each in psutil.Process().net_connections() if each.raddr)
        return sum(address.port == server.server_address[1] for address in mine)

    with Server((CROWDED, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        web = f"https://{CROWDED}:{server.server_address[1]}"
        urls = [f"{web}/{name}/{n}" for name in ("silent", "drips", "endless") for n in range(4)]
        with Fetcher(replace(SETTINGS, deadline=0.5, max_bytes=2 << 30, per_host=12)) as fetcher:
            assert {outcome.reason for _, outcome in fetcher.run((url, url) for url in urls)} == {"deadline"}
            until = time.monotonic() + 5
            while connections() and time.monotonic() < until:
                time.sleep(0.02)
            assert connections() == 0
        done.set()
        server.shutdown()


# Of 512 KiB at most, made to keep whoever reads them busy.
MADE_TO_BE_SLOW = [
    "\n" * 500_000,
    "".join(f"User-agent: a{n}\n" for n in range(15_000)) + "Disallow: /x\n" * 20_000,
    "User-agent: *\n" + "".join(f"Disallow: /{n}/x\n" for n in range(9_990)),
    "User-agent: *\n" + "Content-Signal: /no ai-train=no\nAllow: /\n" * 4_900,
    "User-agent: *\n" + ("Disallow: /" + "%41" * 5_000 + "\n") * 34,
    "User-agent: *\n" + "Disallow: /*a*b\n" * 990,
    "User-agent: *\nDisallow: /" + "*a" * 1_900 + "b\n",
]


def test_D4_no_robots_txt_keeps_the_event_loop_from_other_sites_for_long():
    def reply(host: str, path: str) -> bytes:
        return robots(MADE_TO_BE_SLOW[int(host.rpartition(".")[2]) - 1])(host, path)

    ticks: list[float] = []
    with CountingServer(reply).serving() as server, Fetcher(replace(SETTINGS, robots=True)) as fetcher:

        def tick() -> None:
            # Of its thread alone: this machine may do much else.
            ticks.append(time.thread_time())
            fetcher._loop.call_later(0.001, tick)

        fetcher._loop.call_soon_threadsafe(tick)
        hosts = [f"127.0.1.{n + 1}:{server.port}" for n in range(len(MADE_TO_BE_SLOW))]
        urls = [f"http://{host}/{n}/{'a' * 4_000}" for n in range(20) for host in hosts]
        outcomes = [outcome for _, outcome in fetcher.run((url, url) for url in urls)]
    assert all(isinstance(outcome, Fetched) for outcome in outcomes)
    assert max(after - before for before, after in pairwise(ticks)) < 0.05


@pytest.mark.parametrize(
    "text",
    [
        "Disallow: /x\n" * 10_001,
        "Disallow: /*x\n" * 1_001,
        "Disallow: /" + "*a" * 2_001,
        "Disallow: /" + "a" * 20_000,
    ],
)
def test_D4_a_robots_txt_beyond_all_bounds_allows_nothing(text):
    assert not rules("User-agent: *\n" + text).allow(URL("http://example.org/"))
    assert rules("User-agent: other\n" + text).allow(URL("http://example.org/"))
