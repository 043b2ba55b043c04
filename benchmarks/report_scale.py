"""Claim: reports cost per unit, not per row; what needs rows is read on all cores, many requests in flight.

    python benchmarks/report_scale.py FOLDER [--before CHECKOUT] [--units 10000] [--latency-ms 30]

Makes sealed datasets in FOLDER: many small units (20 rows), and fewer whole ones (16,384 rows), their URLs
of sites by Zipf's law; images are few and in one tar that all units use. Each command is a process by itself,
of this checkout or another, which reads the same files: wall time, and CPU time of all its processes, with
their start. `without counts` is the same dataset without the files beside the commits, as earlier versions
left it. An object store is `slow_object_server.py` on this machine, which shares the cores.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from slow_object_server import served

from ingest.dataset.commit import commit
from ingest.dataset.records import FileRecord
from ingest.dataset.schema import NO_COLUMNS
from ingest.dataset.seal import seal
from ingest.dataset.shard import InPlaceWriter
from ingest.image.check import Checked
from ingest.store.open import open_store

TAR = "pool/pool.tar"
IMAGES = 256
FINGERPRINT = "f" * 64
LOST = (
    ("rejected", "too_small"),
    ("failed", "http_404"),
    ("failed", "timeout"),
    ("failed", "robots_disallowed"),
)
DATASETS = ("small", "whole", "remote")
COMMANDS = {
    "stats": ["stats", "--json"],
    "card": ["card"],
    "show": ["show", "--output"],
    "view": ["view", "--where", "caption like '%7,%'", "--name"],
    "verify --level sizes": ["verify", "--level", "sizes"],
    "verify": ["verify"],
}


def make(folder: Path, units: int, rows: int) -> None:
    """A sealed dataset, as a crawl leaves it."""
    store, draw = open_store(folder), random.Random(0)
    pool = []
    data = b""
    for number in range(IMAGES):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (number, number // 2, 0)).save(buffer, "jpeg")
        pool.append((len(data), buffer.getvalue()))
        data += buffer.getvalue()
    (folder / TAR).parent.mkdir(parents=True)
    (folder / TAR).write_bytes(data)
    tar = FileRecord(name=TAR, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    hosts = rows * units // 4
    for unit in range(units):
        with InPlaceWriter(store, unit, shard=tar, extra=NO_COLUMNS) as writer:
            for row in range(rows):
                host = int(hosts ** draw.random())
                url = f"https://img{host}.example{host}.com/2026/pictures/{unit}-{row}.jpg"
                kept = draw.random() < 0.7
                offset, image = pool[draw.randrange(IMAGES)]
                status, reason = ("kept", "") if kept else draw.choice(LOST)
                verdict = Checked(
                    status=status,  # type: ignore[arg-type]
                    reason=reason,
                    format="jpeg" if kept else None,
                    width=8 if kept else None,
                    height=8 if kept else None,
                    sha256=hashlib.sha256(image).hexdigest() if kept else None,
                    phash=draw.getrandbits(63) if kept else None,
                )
                writer.add(
                    verdict,
                    image,
                    offset=offset,
                    url=url,
                    labels=[f"thing {draw.randrange(100)}"],
                    caption=f"a photograph of thing {row}, seen from the side",
                    retryable=reason == "timeout",
                    http_status=404 if reason == "http_404" else 200 if kept else None,
                )
            commit(store, writer.publish(generation=0, fingerprint=FINGERPRINT))
    seal(store, dict.fromkeys(range(units), FINGERPRINT))


def prepared(folder: Path, name: str, units: int, rows: int) -> Path:
    """A dataset, and beside it the same one without counts; made, if they are not there."""
    whole, bare = folder / f"{name}-{units}", folder / f"{name}-{units}-no-counts"
    if not whole.exists():
        make(whole, units, rows)
    if not bare.exists():
        shutil.copytree(whole, bare, ignore=shutil.ignore_patterns("counts"))
    return whole


def measure(words: Sequence[str], tree: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    command = [sys.executable, "-c", "from ingest.cli import main; main()", *words]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        command,
        env=os.environ | environment | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    took, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--units", type=int, default=10_000, help="small ones")
    parser.add_argument("--whole-units", type=int, default=60)
    parser.add_argument("--remote-units", type=int, default=100, help="small ones in an object store")
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--before", type=Path, help="another checkout, which is measured, too")
    options = parser.parse_args()
    trees = {"now": Path(__file__).resolve().parent.parent}
    if options.before:
        trees["before"] = options.before.resolve()
    sizes = {
        "small": (options.units, 20),
        "whole": (options.whole_units, 16_384),
        "remote": (options.remote_units, 20),
    }
    made = {name: prepared(options.folder, name, *sizes[name]) for name in options.datasets}
    print("| dataset | command | checkout | s | CPU s |\n|---|---|---|---|---|", flush=True)
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with served(options.folder.parent, latency_ms=options.latency_ms) as url:
        environment = keys | {"AWS_ENDPOINT_URL": url}
        for name, folder in made.items():
            for counts in ("", "-no-counts"):
                place = f"{folder}{counts}"
                if name == "remote":
                    place = f"s3://{options.folder.name}/{folder.name}{counts}"
                for command in options.commands:
                    for tree, checkout in trees.items():
                        if tree == "before" and not counts:
                            continue  # it reads what is in both
                        words = [COMMANDS[command][0], place, *COMMANDS[command][1:]]
                        if words[-1] == "--name":
                            words.append(f"v{time.time_ns()}")
                        if words[-1] == "--output":
                            words.append(str(options.folder / "shown.html"))
                        took, cpu = measure(words, checkout, environment)
                        told = f"{folder.name}{' without counts' if counts else ''}"
                        print(f"| {told} | {command} | {tree} | {took:.1f} | {cpu:.1f} |", flush=True)


if __name__ == "__main__":
    main()
