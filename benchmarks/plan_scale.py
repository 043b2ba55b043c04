"""Claim: planning costs the same for each URL however many there are, in bounded memory, whatever the skew.

    python benchmarks/plan_scale.py FOLDER [--rows 5000000 20000000] [--giant 0.25]

Lists in Parquet with captions; one site has a share of all URLs, the others few each, and a tenth of the URLs
come twice. Each is planned by a new process. Prints wall time, CPU time of all its processes, the largest
anonymous memory of the planning one, and the largest size of what lay in the folder for temporary files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CHUNK = 1 << 18


def write_list(path: Path, rows: int, giant: float) -> None:
    random = np.random.default_rng(0)
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            site = np.where(random.random(count) < giant, 0, random.integers(1, rows // 10, count))
            picture = np.where(
                random.random(count) < 0.1, random.integers(0, rows // 10, count), start + np.arange(count)
            )
            site = np.where(picture < rows // 10, picture % 1000, site)
            pairs = list(zip(site.tolist(), picture.tolist(), strict=True))
            urls = [f"https://img{s}.example{s}.com/2026/pictures/{p}.jpg" for s, p in pairs]
            captions = [f"a photograph of thing {p}, seen from the side" for _, p in pairs]
            writer.write_table(pa.table([urls, captions], schema=schema))


def plan(source: str, output: str) -> None:
    """As a child: plan, and print what it took."""
    from ingest.crawl.crawl import plan_shards
    from ingest.plan.settings import CrawlSettings
    from ingest.progress.counts import Counts
    from ingest.web.settings import FetchSettings

    anonymous, scratch, going = 0, 0, True

    def look() -> None:
        nonlocal anonymous, scratch
        while going:
            status = Path("/proc/self/status").read_text()
            anonymous = max(anonymous, int(status.partition("RssAnon:")[2].split()[0]))
            files = [path for path in Path(os.environ["TMPDIR"]).rglob("*") if path.is_file()]
            scratch = max(scratch, sum(path.stat().st_size for path in files if path.exists()))
            time.sleep(0.5)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    start = time.monotonic()
    settings = CrawlSettings(fetch=FetchSettings(contact="https://example.org"))
    made = plan_shards([source], output, settings, progress=lambda counts: None, counts=Counts())
    took, going = time.monotonic() - start, False
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used)
    lanes = len(getattr(made, "lanes", ()))
    print(json.dumps([took, cpu, anonymous / 1e3, scratch / 1e6, made.rows, len(made.units), lanes]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000_000, 20_000_000])
    parser.add_argument("--giant", type=float, default=0.25)
    parser.add_argument("--before", type=Path, help="another checkout, which plans instead")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        plan(*options.child)
        return
    tree = (options.before or Path(__file__).resolve().parent.parent).resolve()
    print("| rows | planned | units | lanes | s | CPU s | CPU µs a row | anonymous MB | scratch MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rows in options.rows:
        source = options.folder / f"{rows}-{options.giant}.parquet"
        options.folder.mkdir(parents=True, exist_ok=True)
        if not source.exists():
            write_list(source, rows, options.giant)
        scratch = options.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        output = options.folder / f"out-{rows}-{os.getpid()}"
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "TMPDIR": str(scratch)}
        words = [sys.executable, __file__, str(options.folder), "--child", str(source), str(output)]
        told = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        took, cpu, anonymous, most, planned, units, lanes = json.loads(told.splitlines()[-1])
        print(
            f"| {rows:,} | {planned:,} | {units:,} | {lanes} | {took:.0f} | {cpu:.0f} "
            f"| {1e6 * cpu / rows:.1f} | {anonymous:.0f} | {most:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
