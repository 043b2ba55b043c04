"""Claim: the fence costs decoders nothing, and lists read behind it cost planning less than a tenth.

    python benchmarks/fence.py images [--rounds 9] [--images 1000]
    python benchmarks/fence.py lists [--rounds 5] [--rows 1000000]

Each round does the same with the fence and without, in turns; what counts is CPU time, of this process and of
those that it starts, with their start. `images`: made-up photographs of 640x480 as JPEG go through one
checking process, to be kept with a hash, and to be resized; a verdict that differs ends it. `lists`: a
Parquet and a CSV list with captions and three further columns become a plan; without the fence, this process
reads them.
"""

import argparse
import contextlib
import io
import os
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from PIL import Image

from ingest.crawl.crawl import plan_shards
from ingest.fence.reading import end_waiting
from ingest.image.check import Checked, Treatment
from ingest.image.check_pool import Checker
from ingest.plan.settings import CrawlSettings, FetchSettings
from ingest.progress.counts import Counts
from ingest.sources import url_listing

UNFENCED = """
from ingest.fence import fence
fence.fence = lambda memory: fence._bound(memory)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["images", "lists"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "images":
            images(Path(folder), arguments.rounds, arguments.images)
        else:
            lists(Path(folder), arguments.rounds, arguments.rows)


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def in_turns(
    rounds: int, fenced: Callable[[], Any], unfenced: Callable[[], Any]
) -> list[tuple[float, float]]:
    """CPU seconds of both, round by round; the one that begins changes."""
    fenced()  # whatever is imported and cached is so for all
    found = []
    for number in range(rounds):
        seconds: dict[bool, float] = {}
        for which in (True, False) if number % 2 else (False, True):
            before = cpu_seconds()
            (fenced if which else unfenced)()
            seconds[which] = cpu_seconds() - before
        found.append((seconds[True], seconds[False]))
    return found


def told(name: str, pairs: list[tuple[float, float]], count: int, unit: str) -> None:
    for label, place in (("fenced", 0), ("unfenced", 1)):
        rates = sorted(count / pair[place] for pair in pairs)
        print(
            f"{name:16} {label:9} {statistics.median(rates):12,.0f} {unit} per CPU-second "
            f"({rates[0]:,.0f} to {rates[-1]:,.0f})"
        )
    ratios = sorted(fenced / unfenced for fenced, unfenced in pairs)
    spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
    print(f"{name:16} CPU time fenced / unfenced: {statistics.median(ratios):.3f} ({spread})", flush=True)


def images(folder: Path, rounds: int, count: int) -> None:
    generator = np.random.default_rng(0)
    pictures = [_photograph(generator) for _ in range(count)]
    (folder / "sitecustomize.py").write_text(UNFENCED)

    def checked(treatment: Treatment) -> list[Checked]:
        with Checker(treatment, workers=1, seconds=60, memory_mb=768) as checker:
            return [verdict for _, _, verdict in checker.run(enumerate(pictures))]

    def checked_unfenced(treatment: Treatment) -> list[Checked]:
        with mock.patch.dict(os.environ, {"PYTHONPATH": str(folder)}):
            return checked(treatment)

    for name, treatment in (("kept, hashed", Treatment()), ("resized to 256", Treatment(resize=256))):
        if checked(treatment) != checked_unfenced(treatment):
            raise SystemExit(f"{name}: verdicts differ")
        pairs = in_turns(rounds, lambda t=treatment: checked(t), lambda t=treatment: checked_unfenced(t))
        told(name, pairs, count, "images")


def _photograph(generator: np.random.Generator) -> bytes:
    small = generator.integers(0, 256, (60, 80, 3), np.uint8)
    picture = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def lists(folder: Path, rounds: int, rows: int) -> None:
    numbers = np.arange(rows)
    table = pa.table(
        {
            "url": [f"https://site{n * 7919 % 50_000}.example/images/{n:09d}.jpg" for n in numbers],
            "caption": [f"a picture of {n % 977} cats, asleep on chair {n}" for n in numbers],
            "width": numbers % 2_000,
            "score": numbers / rows,
            "lang": ["en" if n % 3 else "de" for n in numbers],
        }
    )
    pq.write_table(table, folder / "l.parquet")
    pa_csv.write_csv(table, folder / "l.csv")
    outputs = iter(range(1_000_000))

    def plan(name: str) -> None:
        settings = CrawlSettings(fetch=FetchSettings(contact="a@b.org"))
        output = folder / f"out{next(outputs)}"
        plan_shards([str(folder / name)], output, settings, progress=lambda counts: None, counts=Counts())
        end_waiting()  # its CPU time is counted when it has ended

    def plan_unfenced(name: str) -> None:
        with mock.patch.object(url_listing, "read_fenced", _read_here):
            plan(name)

    for name in ("l.parquet", "l.csv"):
        pairs = in_turns(rounds, lambda n=name: plan(n), lambda n=name: plan_unfenced(n))
        told(name, pairs, rows, "rows")


def _read_here(
    reader: Callable[..., Iterator[pa.Table]], files: list[Any], arguments: dict[str, Any], **_: Any
) -> Iterator[pa.Table]:
    @contextlib.contextmanager
    def opened() -> Iterator[Any]:
        files[0].seek(0)
        yield files[0]

    return reader(opened, **arguments)


if __name__ == "__main__":
    main()
