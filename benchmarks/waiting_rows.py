"""Claim: a row that waits, of a crawl with giants, is a number and not an object.

    python benchmarks/waiting_rows.py

A plan of four units of 16,384 URLs with captions, without a network. Bytes of memory for each row, of objects
of Python and of columns of Arrow, are counted for: rows that are put aside until their host has a turn; rows
whose result waits for its place, as that of the unit's first row is not there; and rows that are written, of
a unit that is open. What a unit's rows take as they were planned is in each of them. Results are of images of
20 kB; the 32 MiB that wait in memory, whatever the number of rows, are not in the figures.
"""

from __future__ import annotations

import hashlib
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow as pa

from ingest.crawl import make_units
from ingest.crawl.crawl import plan_shards
from ingest.image.check import Checked
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import Counts
from ingest.web.settings import FetchSettings

UNIT_ROWS, UNITS = 16_384, 4
IMAGE = b"x" * 20_000


def lines() -> str:
    """URLs as long as those of the web, and captions."""
    names = [hashlib.md5(str(n).encode()).hexdigest() for n in range(UNIT_ROWS * UNITS)]
    return "".join(
        f"https://img{n % 5000}.example{n % 5000}.org/photos/2023/{name}.jpg,a caption of some letters {n}\n"
        for n, name in enumerate(names)
    )


def verdict(row: int) -> Checked:
    digest = hashlib.sha256(str(row).encode()).hexdigest()
    sides = {"width": 640 + row % 7, "height": 480, "original_width": 640, "original_height": 480}
    return Checked(status="kept", format="jpeg", sha256=digest, phash=int(digest[:16], 16), **sides)


def measure(folder: Path, what: str) -> tuple[float, float]:
    fetch = FetchSettings(contact="test@example.org")
    (folder / "urls.csv").write_text("url,caption\n" + lines())
    settings, counts = CrawlSettings(unit_rows=UNIT_ROWS, fetch=fetch), Counts()
    plan = plan_shards(
        [str(folder / "urls.csv")], folder / what, settings, progress=lambda counts: None, counts=counts
    )
    crawl = make_units._Crawl(
        plan=plan, units=plan.units, sources={}, fetch=fetch, counts=counts, progress=lambda counts: None
    )
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    aside, rows = [], 0
    for unit in crawl._units(plan.units):
        if what == "aside":
            aside.append(list(unit.requests()))
        for row in range(0 if what == "written" else 1, len(unit.table) - 1):
            rows += 1
            if what != "aside":
                # Not one object for all, which would count once.
                crawl.take(make_units._Attempt(unit, row, 200), bytes(bytearray(IMAGE)), verdict(row))
    python, held = tracemalloc.get_traced_memory()[0], make_units._WAITING_BYTES - crawl._memory.left
    tracemalloc.stop()
    found = (python - held) / rows, (pa.total_allocated_bytes() - before) / rows
    crawl.close()
    return found


def main() -> None:
    for what in ("aside", "waiting", "written"):
        with tempfile.TemporaryDirectory() as folder:
            python, arrow = measure(Path(folder), what)
            print(f"{what}: {python:.0f} bytes a row as objects, {arrow:.0f} in columns", flush=True)


if __name__ == "__main__":
    main()
