"""--give-up: when the time is over every URL has its outcome, and nobody is asked any more."""

import threading
import time
from collections import Counter
from dataclasses import replace

from test_politeness import SETTINGS, CountingServer, image, reasons, robots

from ingest.web.fetcher import Fetcher


def test_what_was_not_asked_for_in_time_is_given_up_and_what_is_under_way_ends():
    with CountingServer(image, seconds=0.1).serving() as server:
        urls = [f"http://127.0.1.{1 + n % 2}:{server.port}/{n}" for n in range(400)]
        begun = time.monotonic()
        found = reasons(urls, replace(SETTINGS, give_up_at=time.time() + 0.5), window=100)
    assert time.monotonic() - begun < 3
    asked = sum(map(len, server.times.values()))
    assert found == {"": asked, "given_up": 400 - asked} and 4 <= asked <= 40


def test_who_waits_for_robots_txt_or_another_try_is_given_up():
    free = threading.Event()

    def reply(host: str, path: str) -> bytes:
        if path == "/robots.txt" and host == "127.0.1.1":
            free.wait(5)
        if path.startswith("/busy"):
            return b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
        return robots("User-agent: *\nCrawl-delay: 20\n")(host, path)

    settings = replace(SETTINGS, robots=True, tries=9, give_up_at=time.time() + 0.7)
    with CountingServer(reply).serving() as server, Fetcher[str](settings) as fetcher:
        base = f"http://127.0.1.{{}}:{server.port}"
        urls = [f"{base.format(1)}/{n}" for n in range(5)]  # wait for robots.txt
        urls += [f"{base.format(2)}/{n}" for n in range(5)]  # wait for their turn
        urls += [f"{base.format(3)}/busy"]  # waits for its next try
        threading.Timer(1.5, free.set).start()
        begun = time.monotonic()
        found = Counter(getattr(outcome, "reason", "") for _, outcome in fetcher.run((u, u) for u in urls))
        assert time.monotonic() - begun < 4
    # Of those with a delay one was asked for at once, unless robots.txt itself was that turn.
    assert found["given_up"] in (10, 11) and found.total() == 11


def test_D4_a_time_that_is_over_asks_nobody():
    with CountingServer(image).serving() as server:
        urls = [f"http://127.0.1.1:{server.port}/{n}" for n in range(5)]
        assert reasons(urls, replace(SETTINGS, give_up_at=time.time() - 1)) == {"given_up": 5}
    assert not server.times
