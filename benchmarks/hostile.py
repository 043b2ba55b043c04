"""Claim: malformed files end as rows with a status, in bounded memory and time.

    python benchmarks/hostile.py FOLDER|TAR [--workers 2] [--resize 256]

Crawls the source into a temporary dataset while the memory of the whole process tree is sampled, then sends
every file alone through one checking process and times it. Exits with 1 if an attempt has no row, the tree
reached 2 GB, or a file took longer than 10 s.
"""

import argparse
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from peak_memory import PeakMemory

from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import sealed_units
from ingest.image.check import Treatment
from ingest.image.check_pool import Checker
from ingest.plan.settings import CrawlSettings
from ingest.sources.opening import open_images

MEMORY_LIMIT = 2_000_000_000
SECONDS_LIMIT = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--resize", type=int)
    arguments = parser.parse_args()
    settings = CrawlSettings(treatment=Treatment(resize=arguments.resize))
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        with PeakMemory() as memory:
            report = crawl_shards(
                [arguments.source],
                Path(folder) / "out",
                settings,
                workers=arguments.workers,
                progress=lambda counts: None,
            )
        seconds = time.monotonic() - started
        metas = sealed_units(report.output, report.root)["meta"].to_pylist()
        rows = [row for meta in metas for row in pq.read_table(report.output / meta).to_pylist()]
    planned = report.counts.planned
    print(f"{planned} files planned, {len(rows)} rows, {seconds:.1f} s, root {report.root[:12]}")
    for (status, reason), count in sorted(
        Counter((row["status"], row["reason"]) for row in rows).items(), key=str
    ):
        print(f"  {count:5} {status} {reason or ''}")
    largest = [
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    bound = largest[0] + arguments.workers * largest[1]
    print(f"peak of the process tree: {memory.peak / 2**20:.0f} MiB proportional, sampled every 10 ms;")
    print(
        f"  at most {bound:.0f} MiB: crawler {largest[0]:.0f}"
        f" + {arguments.workers} x largest checker {largest[1]:.0f}"
    )
    slowest, name = slowest_file(arguments.source, settings)
    print(f"slowest file alone: {slowest:.3f} s, {name}")
    if len(rows) != planned or bound * 2**20 >= MEMORY_LIMIT or slowest > SECONDS_LIMIT:
        raise SystemExit(1)


def slowest_file(source: str, settings: CrawlSettings) -> tuple[float, str]:
    opened = open_images(source)
    items = list(opened.items())
    read = opened.read(items, max_bytes=settings.treatment.limits.max_bytes)
    times = []
    with Checker[str](
        settings.treatment, workers=1, seconds=settings.seconds, memory_mb=settings.memory_mb
    ) as checker:
        list(checker.run([("warm-up", b"")]))
        for item, data in zip(items, read, strict=True):
            started = time.monotonic()
            list(checker.run([("", data)]))
            times.append((time.monotonic() - started, item.path.decode(errors="backslashreplace")))
    opened.close()
    return max(times)


if __name__ == "__main__":
    main()
