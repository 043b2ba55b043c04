"""Claim: giant sites hold up nothing but themselves: five are asked as fast as politeness lets five be asked.

    python benchmarks/crawl_giants.py [--seconds 30] [--rows 40000] [--before CHECKOUT]

A server on this machine answers each request after 25 ms with a small picture, on as many addresses as there
are sites. Of lists of one giant site and of five, `--rows` URLs each, images per second are counted, after
five seconds, for `--seconds`; by politeness (two requests of a host at a time) one site gives 80 at most.
Then one giant of 2,000 URLs, 1,000 sites of 8, and both in one list are crawled to their end. CHECKOUT is an
older version of this repository, which crawls the same.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NETWORK = "127.0.0.0/8"
ANSWER_S = 0.025
WARM_UP_S = 5.0


def serve(port: int) -> None:
    """Pictures on every address of this machine."""
    from aiohttp import web
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (48, 48), "red").save(buffer, "JPEG")

    async def answer(request: web.Request) -> web.Response:
        await asyncio.sleep(ANSWER_S)
        return web.Response(body=buffer.getvalue(), content_type="image/jpeg")

    app = web.Application()
    app.router.add_get("/{name}", answer)
    web.run_app(app, host="0.0.0.0", port=port, print=None, access_log=None, backlog=4096)


def crawl(urls: str, output: str, seconds: float | None) -> None:
    """Crawl, as a child; prints seconds and images, to the end or for so long."""
    from ingest.crawl.crawl import crawl_shards
    from ingest.plan.settings import CrawlSettings
    from ingest.web.settings import FetchSettings

    begun: list[tuple[float, int]] = []

    def progress(counts: object) -> None:
        done, now = counts.done, time.monotonic()  # type: ignore[attr-defined]
        if not done:
            return
        if not begun or (len(begun) == 1 and now - begun[0][0] > WARM_UP_S):
            begun.append((now, done))
        if seconds is not None and len(begun) == 2 and now - begun[1][0] > seconds:
            print(json.dumps([now - begun[1][0], done - begun[1][1]]), flush=True)
            os._exit(0)

    fetch = FetchSettings(contact="test@example.org", allow_private=(NETWORK,), per_address=2, robots=False)
    start = time.monotonic()
    report = crawl_shards([urls], output, CrawlSettings(fetch=fetch), workers=1, progress=progress)
    print(json.dumps([time.monotonic() - start, report.counts.done]))


def measured(tree: Path, sites: dict[str, int], port: int, seconds: float | None) -> tuple[float, int]:
    with tempfile.TemporaryDirectory() as folder:
        urls = Path(folder, "urls.txt")
        rows = [f"http://{host}:{port}/{n}.jpg\n" for host, count in sites.items() for n in range(count)]
        urls.write_text("".join(rows))
        words = [sys.executable, __file__, "--child", str(urls), f"{folder}/out", str(seconds or 0)]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
        told = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        took, done = json.loads(told.splitlines()[-1])
        return took, done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--port", type=int, default=18_080)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        urls, output, seconds = options.child
        crawl(urls, output, float(seconds) or None)
        return
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(options.port,), daemon=True)
    server.start()
    time.sleep(3)
    here = Path(__file__).resolve().parent.parent
    giant, small = {"127.0.3.1": 2000}, {f"127.1.{n // 250}.{1 + n % 250}": 8 for n in range(1000)}
    for name, tree in {
        "now": here,
        **({"before": options.before.resolve()} if options.before else {}),
    }.items():
        for count in (1, 5):
            sites = {f"127.0.2.{number}": options.rows for number in range(1, 1 + count)}
            took, done = measured(tree, sites, options.port, options.seconds)
            print(f"{name}: {count} of {options.rows} URLs: {done / took:.0f} images/s", flush=True)
        for title, sites in {"giant": giant, "small sites": small, "both": giant | small}.items():
            took, done = measured(tree, sites, options.port, None)
            print(f"{name}: {title}: {done} images in {took:.1f} s", flush=True)
    server.terminate()


if __name__ == "__main__":
    main()
