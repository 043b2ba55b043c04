"""Thirty pages as Chromium loads them: what it shows is linked, and where it is not so, why."""

import re
import shutil
import subprocess
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ingest.links.page import page_links

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
GIF = bytes.fromhex("47494638396101000100800000000000ffffff2c00000000010001000002024401003b")
# As lazy-load libraries do.
LAZY = """<script>for (const image of document.querySelectorAll("img")) {
    const data = image.dataset;
    if (data.srcset) image.srcset = data.srcset;
    const src = data.src || data.lazySrc || data.original;
    if (src) image.src = src;
}</script>"""
# Of each page: what it links, and what Chromium loads if that is not the same.
PAGES: list[tuple[str, str, str | None]] = [
    ("<img src=a.jpg>", "a.jpg", None),
    ("<img sizes=9000px srcset='a.jpg 400w, b.jpg 800w' src=c.jpg>", "b.jpg", None),
    ("<img srcset='a.jpg, b.jpg 2x, c.jpg 1.5x' src=d.jpg>", "b.jpg", None),
    ("<img sizes=9000px srcset='w_4,h_3/a.jpg 400w,w_8,h_6/a.jpg 800w' src=c.jpg>", "w_8,h_6/a.jpg", None),
    ("<img srcset='a.jpg 9z, b.jpg -3x' src=c.jpg>", "c.jpg", None),
    ("<base href=/sub/><img src=a.jpg>", "/sub/a.jpg", None),
    ("<base href=/sub/><base href=/other/><img src=a.jpg>", "/sub/a.jpg", None),
    ("<img src='a.jpg?x=1&amp;y=2&copy=3&param;=&amp;=4'>", "a.jpg?x=1&y=2&copy=3&param;=&=4", None),
    ("<img src=' a b.jpg '>", "a%20b.jpg", None),
    ("<img src='/a\n  b.jpg'>", "/a%20%20b.jpg", None),
    ("<img src='a\tb.jpg'>", "ab.jpg", None),
    ("<img src='\\dir\\a.jpg'>", "/dir/a.jpg", None),
    ("<img src=./x/../%7ea/b%2e%2E.jpg>", "%7ea/b%2e%2E.jpg", None),
    ("<img src='\u00e4.jpg?\u00e4'>", "%C3%A4.jpg?%C3%A4", None),
    ("<img src=a.jpg src=b.jpg><IMG SRC='c.jpg'/>", "a.jpg c.jpg", None),
    ("<image src=a.jpg><svg><style/></svg><img src=b.jpg>", "a.jpg b.jpg", None),
    ("<!-- <img src=no.jpg> --><!--> <img src=a.jpg> <!-- --!><img src=b.jpg>", "a.jpg b.jpg", None),
    ("<script>'<img src=no>'</script><textarea><img src=no></textarea><img src=a.jpg>", "a.jpg", None),
    ("<p title='<img src=no.jpg>'><img alt='>' src=a.jpg", "", None),
    ("<div style='background:url(no.jpg)'></div><video poster=no.jpg></video><input type=image src=no.jpg>",
     "", "no.jpg"),
    ("<img srcset='a.jpg 1w' src=b.jpg>", "b.jpg", "a.jpg"),
    ("<picture><source srcset='a.jpg 9w'><img></picture><picture><source src=no><img src=b.jpg></picture>",
     "a.jpg b.jpg", None),
    # The same image in a format that is read by more.
    ("<picture><source type=image/webp srcset=a.webp><img src=a.jpg></picture>", "a.jpg", "a.webp"),
    ("<picture><source type=image/no srcset=no></picture><source srcset=no><img src=b.jpg>", "b.jpg",
     None),
    ("<picture><source srcset=no.jpg></picture><img src=a.jpg>", "a.jpg", None),
    # Placeholders are loaded first.
    (f"<img src=data:image/gif;base64,R0lGOD data-src=a.jpg>{LAZY}", "a.jpg", None),
    (f"<img src=wait.gif data-src=a.jpg><img src=small.jpg data-original=b>{LAZY}", "a.jpg small.jpg",
     "wait.gif a.jpg small.jpg b"),
    (f"<img srcset='wait.gif 1w' data-srcset='a.jpg 800w'><img src=b.jpg data-image=12 data-url=/>{LAZY}",
     "a.jpg b.jpg", "wait.gif a.jpg b.jpg"),
    # Scripts are not run: what they have yet to fill in is none of ours.
    ("<img src='{{no}}'><img src='${no}'><img src='a.jpg' data-src='[[no]]'>", "a.jpg",
     "%7B%7Bno%7D%7D $%7Bno%7D a.jpg"),
    # Chromium has scripts, and no AMP.
    ("<noscript><img src=a.jpg></noscript><template><img src=b.jpg></template><amp-img src=c.jpg></amp-img>"
     "<meta property=og:image content=d.jpg>", "a.jpg b.jpg c.jpg d.jpg", ""),
]  # fmt: skip


def paths(names: str, page: int) -> set[str]:
    return {name if name.startswith("/") else f"/{page}/{name}" for name in names.split()}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What Chromium asks for: paths by the number of the page."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    asked: defaultdict[int, set[str]] = defaultdict(set)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                frames = (f"<iframe width=3000 src=/{n}/page.html></iframe>" for n in range(len(PAGES)))
                kind, body = "text/html", "".join(frames).encode()
            elif found := re.fullmatch(r"/([0-9]+)/page\.html", self.path):
                kind, body = "text/html; charset=utf-8", PAGES[int(found[1])][0].encode()
            else:
                kind, body = "image/gif", GIF
                if found := re.search(r"/([0-9]+)/page\.html", self.headers.get("Referer", "")):
                    asked[int(found[1])].add(self.path)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            """Not in a test's output."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, address: object) -> None:
            """A browser may leave."""

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        options = (
            "--headless --no-sandbox --disable-gpu --window-size=3000,3000 --force-device-scale-factor=3"
        )
        profile = f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"
        url = f"http://127.0.0.1:{server.server_port}/"
        subprocess.run(
            [CHROMIUM, *options.split(), profile, "--dump-dom", url],
            check=True,
            timeout=60,
            capture_output=True,
        )
        server.shutdown()
    return asked


def test_thirty_pages_link_what_they_are_said_to():
    assert len(PAGES) == 30
    for number, (html, ours, _) in enumerate(PAGES):
        base = f"http://host.example/{number}/page.html"
        links = {
            link.url.removeprefix("http://host.example") for link in page_links(html.encode(), base).links
        }
        assert links == paths(ours, number), html


@pytest.mark.slow
def test_chromium_loads_what_is_linked(loaded):
    expected = {
        number: paths(ours if theirs is None else theirs, number)
        for number, (_, ours, theirs) in enumerate(PAGES)
    }
    assert {number: loaded[number] for number in expected} == expected
