"""A small web to crawl: pictures, a site that opts out, pages that are gone. Everything is on 127.0.0.0/8."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ingest.crawl.crawl import crawl_shards
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import CrawlReport
from ingest.web.settings import FetchSettings

MARKUP = "<script>alert(1)</script>\u202egpj.exe"


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    rough = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(rough).resize((60, 40), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        headers = {}
        status, body = 404, b"gone"
        if self.path == "/robots.txt":
            status, body = 200, b"User-agent: *\nDisallow: /private/\n"
        elif "/noai/" in self.path:
            status, headers = 200, {"X-Robots-Tag": "noai"}
        elif name.removesuffix(".jpg").isdigit():
            status, body = 200, picture(int(name.removesuffix(".jpg")))
        elif name == "page.html":
            status, body = 200, b"<html>no picture</html>"
        elif name == "busy.jpg":
            status = 503
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Not in a test's output."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, address: object) -> None:
        """A client may hang up."""


@contextmanager
def _serving() -> Iterator[int]:
    with _Server(("", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def crawl_small_web(folder: Path, *, robots: bool = True) -> CrawlReport:
    """Make the dataset `folder`/web of 16 URLs of three hosts.

    8 are pictures, 2 lie where robots.txt does not let us, 2 have an X-Robots-Tag, 1 is no picture, 2 are
    gone, 1 is busy.
    """
    with _serving() as port:
        one, two, three = (f"http://127.0.0.{host}:{port}" for host in (1, 2, 3))
        urls = [f"{one}/{number}.jpg" for number in range(6)] + [f"{two}/{number}.jpg" for number in (6, 7)]
        urls += [f"{three}/private/{number}.jpg" for number in (8, 9)]
        urls += [f"{three}/noai/{number}.jpg" for number in (10, 11)]
        urls += [f"{one}/page.html", f"{two}/gone.jpg", f"{two}/{MARKUP}", f"{one}/busy.jpg"]
        folder.mkdir(exist_ok=True)
        table = pa.table({"url": urls, "page": ["p"] * 16, "<i>score": [0.5] * 16})
        pq.write_table(table, folder / "list.parquet")
        fetch = FetchSettings(
            contact="https://example.org/removal", allow_private=("127.0.0.0/8",), tries=1, robots=robots
        )
        return crawl_shards(
            [str(folder / "list.parquet")],
            folder / "web",
            CrawlSettings(unit_rows=7, fetch=fetch),
            workers=1,
            progress=lambda counts: None,
        )
