"""A web server with as many sites as one likes, all on this machine, each full of the same pictures."""

import io
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

SITES = [f"127.0.2.{number}" for number in range(1, 6)]
NETWORK = "127.0.2.0/24"


class PictureServer:
    """Serves `/{number}.png`, every seventh as 404 and every eleventh as a text; a context manager.

    Args:
        address: to listen on.
        seconds: that each answer takes.

    Attributes:
        asked: how often each path was, in all.
        answering: cleared, no picture is sent until it is set again.
        waiting: how many requests wait for that.
    """

    def __init__(self, address: str = "0.0.0.0", *, seconds: float = 0.0) -> None:
        self.asked: Counter[str] = Counter()
        self.seconds = seconds
        self.answering = threading.Event()
        self.answering.set()
        self.waiting = 0
        owner, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with lock:
                    owner.asked[self.path] += 1
                status, body = answer(self.path)
                if status == 200:
                    time.sleep(owner.seconds)
                    with lock:
                        owner.waiting += 1
                    owner.answering.wait()
                    with lock:
                        owner.waiting -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words: object) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *words: object) -> None:
                """Crawlers that are killed hang up."""

        self._server = Server((address, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def write_list(self, path: Path, count: int, sites: list[str] | None = None) -> Path:
        """A list of so many pictures, each of one of the sites."""
        hosts = sites or SITES
        urls = [f"http://{hosts[n % len(hosts)]}:{self.port}/{n}.png\n" for n in range(count)]
        path.write_text("".join(urls))
        return path

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def answer(path: str) -> tuple[int, bytes]:
    """Status and body of a path."""
    match = re.fullmatch(r"/(\d+)\.png", path)
    if match is None or int(match[1]) % 7 == 3:
        return 404, b"no"
    number = int(match[1])
    if number % 11 == 5:
        return 200, b"no picture"
    rough = np.random.default_rng(number).integers(0, 256, (4, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rough).resize((24, 16), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return 200, buffer.getvalue()
