"""Claim: a hostile web is crawled to the end, in bounded memory and time, and every URL gets its row.

    python benchmarks/hostile_web.py [--copies 3]

The server of the tests does everything wrong that a server can: bodies by the byte, endless streams, redirect
loops, redirects into private networks, lying lengths and types, compression bombs, 10 GB bodies, 429 and 503
with Retry-After, resets, broken TLS, hostile robots.txt. `ingest crawl-shards` crawls each of its URLs, and
the misbehaving bodies several times over. Exits with 1 if a URL lacks its row or has another reason than its
class must have, a private address was visited, or a bound was passed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq
from peak_memory import PeakMemory

from ingest.dataset.open import sealed_units

sys.path.append(str(Path(__file__).parents[1] / "tests" / "ingest"))
from hostile_server import ALLOWED, HostileServer

COMMAND = [sys.executable, "-c", "from ingest.cli import main; main()", "crawl-shards"]
MEMORY_LIMIT = 1_000_000_000
SECONDS_LIMIT = 60.0
DEADLINE, TRIES = 2.0, 2
# These hold a connection until the deadline or the cap on bytes ends them: worth having many of.
HOLDING = (
    "slow_head",
    "slow_body",
    "nothing",
    "longer_than_comes",
    "only_promises",
    "endless",
    "endless_chunks",
    "ten_gigabytes",
    "gzip_bomb",
    "brotli_bomb",
    "redirect_loop",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copies", type=int, default=3, help="of the URLs that hold a connection")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, HostileServer(Path(name)) as server:
        folder = Path(name)
        expected = server.cases()
        for url in map(server.url, HOLDING):
            expected |= {f"{url}?{copy}": expected[url] for copy in range(1, options.copies)}
        (folder / "urls.txt").write_text("".join(f"{url}\n" for url in expected))
        seconds, peak = crawl(folder, server.ca_file)
        root = json.loads((folder / "out" / "DATASET.json").read_bytes())["sealed"]
        rows = [
            row
            for meta in sealed_units(folder / "out", root)["meta"].to_pylist()
            for row in pq.read_table(folder / "out" / meta).to_pylist()
        ]
        wrong = tell_classes(expected, rows)
        trespasses = server.trespasses
    print(
        f"{len(expected)} URLs, {len(rows)} rows, {seconds:.1f} s, peak {peak / 1e6:.0f} MB RSS of the tree"
    )
    print(f"{trespasses} visits to private addresses, {wrong} URLs without the row that they must have")
    if wrong or trespasses or len(rows) != len(expected) or peak > MEMORY_LIMIT or seconds > SECONDS_LIMIT:
        raise SystemExit(1)


def crawl(folder: Path, ca_file: Path) -> tuple[float, int]:
    """Seconds that the command took, and the largest memory of its processes."""
    command = [*COMMAND, str(folder / "urls.txt"), "--output", str(folder / "out"), "--workers", "2"]
    command += ["--contact", "hostile@example.org", "--allow-private", *ALLOWED, "--max-bytes", str(4 << 20)]
    command += ["--deadline", str(DEADLINE), "--attempts", str(TRIES)]
    started = time.monotonic()
    environment = os.environ | {"SSL_CERT_FILE": str(ca_file)}
    with (
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process,
        PeakMemory(process.pid, kind="rss") as memory,
    ):
        if process.wait() != 0:
            raise SystemExit(f"the crawl ended with {process.returncode}")
    return time.monotonic() - started, memory.peak


def tell_classes(expected: dict[str, str], rows: list[dict[str, object]]) -> int:
    """Print the verdicts of each class; returns how many URLs lack theirs."""
    found = {str(row["url"]): row for row in rows}
    classes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    wrong = 0
    for url, reason in expected.items():
        row = found.get(url)
        name = urlsplit(url).path.strip("/")
        # That a body is empty is found by the checker, not by the fetcher.
        due = {"empty" if name == "empty" else reason}
        if reason == "deadline":
            due.add("host_unreachable")  # after some of these, a host is left alone
        verdict = "NO ROW" if row is None else f"{row['status']} {row['reason'] or ''}".strip()
        if row is None or (row["reason"] or "") not in due:
            wrong += 1
            verdict += f" WRONG, not {' or '.join(sorted(due)) or 'kept'}"
        classes[name][verdict] += 1
    for name, verdicts in sorted(classes.items()):
        print(f"  {name:24} {', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())}")
    return wrong


if __name__ == "__main__":
    main()
