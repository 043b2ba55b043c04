"""How long a list of a million URLs takes to plan, in each format: CPU seconds of the planning process.

Start-up is excluded, and nothing is fetched.

    python benchmarks/plan_lists.py FOLDER
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from ingest.crawl.crawl import plan_shards
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import Counts
from ingest.web.settings import FetchSettings

ROWS = 1_000_000
RUNS = 3


def write_lists(folder: Path) -> None:
    """The same rows in each format; sites have from one to many URLs."""
    random = np.random.default_rng(0)
    sites = random.zipf(1.3, ROWS) % 100_000
    urls = [
        f"https://img{x}.example{x % 1000}.com/a/b/{i}/picture-{i}.jpg?w=300" for i, x in enumerate(sites)
    ]
    captions = [f"a photo of thing {i}" for i in range(ROWS)]
    table = pa.table({"url": urls, "caption": captions, "score": random.random(ROWS), "id": np.arange(ROWS)})
    pq.write_table(table, folder / "a.parquet")
    csv.write_csv(table, folder / "a.csv")
    tabs = csv.WriteOptions(delimiter="\t", quoting_style="none")
    csv.write_csv(table, folder / "a.tsv", tabs)
    with (folder / "a.jsonl").open("w") as file:
        for row in table.to_pylist():
            file.write(json.dumps(row) + "\n")
    (folder / "a.txt").write_text("\n".join(urls))


def main(folder: Path) -> None:
    if not (folder / "a.txt").exists():
        write_lists(folder)
    settings = CrawlSettings(fetch=FetchSettings(contact="https://example.org"))
    for name in ("a.parquet", "a.csv", "a.tsv", "a.jsonl", "a.txt"):
        seconds = []
        for _ in range(RUNS):
            with tempfile.TemporaryDirectory(dir=folder) as output:
                began = time.process_time()
                plan = plan_shards(
                    [str(folder / name)], output, settings, progress=lambda counts: None, counts=Counts()
                )
                seconds.append(time.process_time() - began)
        print(f"{name:<10} {plan.rows:,} rows: {' '.join(f'{each:.2f}' for each in sorted(seconds))} CPU s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
