"""A web server whose answers are a pure function of the URL; only when they come is chance.

Real sockets, in a thread of its own, over a few addresses of this machine, each a host of its own. So two
crawls of the same URLs get the same responses, however often they ask and in whatever order, and have to make
the same bytes.
"""

import asyncio
import io
import random
import threading
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

ALLOWED = ("127.0.2.0/24",)
ADDRESSES = [f"127.0.2.{number}" for number in range(1, 7)]
# Of 20 URLs in a row, those that are no images of their own; see `expected`.
_ODD = {3: "gone", 7: "page", 9: "moved", 12: "cut", 15: "optout", 18: "broken"}


class Verdict(NamedTuple):
    """What a URL's row must say."""

    status: str
    reason: str | None
    http_status: int


_VERDICTS = {
    "gone": Verdict("failed", "http_404", 404),
    "page": Verdict("rejected", "not_an_image", 200),
    "cut": Verdict("failed", "truncated", 200),
    "optout": Verdict("rejected", "x_robots_tag", 200),
    "broken": Verdict("failed", "http_500", 500),
}
_KEPT = Verdict("kept", None, 200)


def expected(url: str) -> Verdict:
    """What becomes of one of `ReplayServer.urls`."""
    return _VERDICTS.get(url.split("/")[3], _KEPT)


@cache
def picture(number: int) -> bytes:
    """A small image, made from its number."""
    rough = np.random.default_rng(number).integers(0, 256, (4, 6, 3), np.uint8)
    image = Image.fromarray(rough).resize((24, 16), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, ("JPEG", "PNG", "WEBP")[number % 3])
    return buffer.getvalue()


def _answer(path: str) -> bytes:
    _, kind, name = path.split("/")
    number = int(name)
    if kind == "gone":
        return _reply("404 Not Found", b"no such picture")
    if kind == "broken":
        return _reply("500 Internal Server Error", b"")
    if kind == "moved":
        return _reply("302 Found", b"", f"Location: /image/{number}")
    if kind == "page":
        return _reply("200 OK", f"<html>picture {number}</html>".encode(), "Content-Type: image/jpeg")
    if kind == "cut":
        return _reply("200 OK", picture(3 * number)[:-200])
    return _reply("200 OK", picture(number), *(["X-Robots-Tag: noai"] if kind == "optout" else []))


def _reply(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class ReplayServer:
    """Started in a thread by `with`.

    Args:
        addresses: of this machine, that serve.

    Attributes:
        delay: mean seconds before an answer, which is up to twice that; may be changed at any time.
        held: no answers at present.
        answered: answers given, robots.txt aside.
    """

    def __init__(self, addresses: Sequence[str] = ADDRESSES[:4]) -> None:
        self.delay = 0.0
        self.held = False
        self.answered = 0
        self._addresses = list(addresses)
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def urls(self, count: int, *, first: int = 0) -> list[str]:
        """Different URLs, the hosts taking turns; six of twenty lead to no image or elsewhere."""
        return [
            f"http://{self._addresses[number % len(self._addresses)]}:{self._port}"
            f"/{_ODD.get(number % 20, 'image')}/{number}"
            for number in range(first, first + count)
        ]

    def __enter__(self) -> "ReplayServer":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        first = await asyncio.start_server(self._serve, self._addresses[0], 0)
        self._port = first.sockets[0].getsockname()[1]
        self._servers = [first]
        if self._addresses[1:]:
            self._servers.append(await asyncio.start_server(self._serve, self._addresses[1:], self._port))

    async def _stop(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                path = request.split(b" ", 2)[1].decode()
                if path == "/robots.txt":
                    writer.write(_reply("404 Not Found", b""))
                    continue
                if self.delay:
                    await asyncio.sleep(random.uniform(0, 2 * self.delay))
                while self.held:
                    await asyncio.sleep(0.02)
                writer.write(_answer(path))
                await writer.drain()
                self.answered += 1
        # A client that was killed leaves in the middle of anything.
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
