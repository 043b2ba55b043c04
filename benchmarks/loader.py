"""Loading against PIL multi-crop over `webdataset`: the same shards, in interleaved rounds of one run.

    python benchmarks/loader.py PHOTOS --work FOLDER [--stock-python PATH] [--rounds 7]

PHOTOS is a folder of photographs. From it come four sealed datasets in FOLDER: the photographs, VGA-size
JPEGs cut from them, small ones, and JPEGs padded to 100 KB. Every measurement is a process of its own on one
core, and counts CPU time within it, so that other work on the machine disturbs little; delivery through
worker processes counts wall time.
`--stock-python` is an interpreter of an environment with `torch webdataset numpy pillow`, for stock Pillow.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image

from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import Dataset, open_dataset
from ingest.plan.settings import CrawlSettings
from pipeline.data.in_hand import InHand
from pipeline.data.loader import Loader
from pipeline.data.modality import modality_of
from pipeline.data.order import plan_order
from pipeline.data.rank_batches import RankBatches
from pipeline.data.reader import Reader
from pipeline.data.workers import keep_freed_memory, numbered
from pipeline.recipe.data import Data

PEER = Path(__file__).with_name("loader_peer.py")
MULTI_CROP = [
    {"count": 2, "size": 224, "scale": [0.14, 1.0]},
    {"count": 6, "size": 96, "scale": [0.05, 0.14]},
]
TWO_SMALL = [{"count": 2, "size": 32, "scale": [0.2, 1.0]}]
VGA_IMAGES, RAW_IMAGES, RAW_BYTES = 500, 6_000, 100_000
RAW_BATCH = 64
PHOTOMETRIC_BATCH = 16


def make_datasets(photos: Path, work: Path) -> None:
    """The sealed datasets that are not there yet."""
    vga = make_vga(photos, work / "vga-images")
    make_raw(vga, work / "raw-images")
    make_small(vga, work / "small-images")
    for name, source in [
        ("photos", photos),
        ("vga", vga),
        ("raw", work / "raw-images"),
        ("small", work / "small-images"),
    ]:
        settings = CrawlSettings(unit_rows=1_500)
        crawl_shards([str(source)], work / name, settings, workers=2, progress=lambda counts: None)


def make_vga(photos: Path, folder: Path) -> Path:
    """640 × 480 pieces of the larger photographs, at least half a photograph each, JPEG quality 85."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    paths = [path for path in sorted(photos.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
    large = [path for path in paths if min(Image.open(path).size) >= 600]
    for number in range(VGA_IMAGES):
        image = Image.open(large[number % len(large)]).convert("RGB")
        zoom = min(image.width / 640, image.height / 480) * rng.uniform(0.75, 1.0)
        left, top = rng.uniform(0, image.width - 640 * zoom), rng.uniform(0, image.height - 480 * zoom)
        box = (left, top, left + 640 * zoom, top + 480 * zoom)
        piece = image.resize((640, 480), Image.Resampling.LANCZOS, box=box)
        piece.save(folder / f"{number:05d}.jpg", quality=85)
    return folder


def make_raw(vga: Path, folder: Path) -> None:
    """JPEGs of exactly 100 KB: random comments go in front."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = [data for path in sorted(vga.iterdir()) if len(data := path.read_bytes()) < RAW_BYTES - 1_000]
    for number in range(RAW_IMAGES):
        data, comments = images[number % len(images)], b""
        while (left := RAW_BYTES - len(data) - len(comments)) > 0:
            # No comment may leave a rest too short for another.
            length = left if left <= 60_000 else 60_000 - 4
            comments += b"\xff\xfe" + (length - 2).to_bytes(2, "big") + rng.bytes(length - 4)
        (folder / f"{number:05d}.jpg").write_bytes(data[:2] + comments + data[2:])


def make_small(vga: Path, folder: Path) -> None:
    """32-pixel JPEGs, four to each VGA image."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for path in sorted(vga.iterdir()):
        for quarter in range(4):
            left, top = 320 * (quarter % 2), 240 * (quarter // 2)
            image = Image.open(path).resize((32, 32), box=(left, top, left + 320, top + 240))
            image.save(folder / f"{path.stem}-{quarter}.jpg")


def data_of(root: Path, crops: list[dict[str, object]], batch_size: int) -> Data:
    return Data.model_validate({"root": str(root), "batch_size": batch_size, "crops": crops})


def measure_crops(root: Path, passes: int, crops: list[dict[str, object]]) -> float:
    """Source images per CPU second: order, read, check, decode, crop, resize, flip."""
    dataset = open_dataset(root)
    batch_size = min(32, len(dataset))
    data = data_of(root, crops, batch_size)
    order = plan_order(samples=len(dataset), batch_size=batch_size, window=data.window, seed=0)
    make = RankBatches(dataset, modality_of(data), order, slice(0, batch_size))
    make(0)
    start = time.process_time()
    for step in range(passes * order.steps_per_epoch):
        make(step)
    return passes * order.steps_per_epoch * batch_size / (time.process_time() - start)


def measure_colour(root: Path, passes: int) -> float:
    """The same and all that the device does, on the CPU, to normalised float32."""
    data = data_of(root, MULTI_CROP, PHOTOMETRIC_BATCH)
    loader = Loader(data, seed=0, rank=0, world_size=1, workers=0, device=torch.device("cpu"))
    batches = loader.from_step(0)
    loader.augment(next(batches)[1])
    steps = passes * loader.steps_per_epoch
    start = time.process_time()
    for _, batch in itertools.islice(batches, steps):
        loader.augment(batch)
    return steps * PHOTOMETRIC_BATCH / (time.process_time() - start)


@dataclass(frozen=True)
class RawBatch:
    """Samples end to end in one tensor."""

    data: torch.Tensor
    sizes: torch.Tensor

    def pin_memory(self) -> "RawBatch":
        return self


class RawBatches:
    """Unchanged samples in the dataset's order, 64 at a time; `checked` verifies each sha256."""

    def __init__(self, dataset: Dataset, *, checked: bool) -> None:
        self._dataset, self._checked = dataset, checked
        self._places = [(unit, row) for unit, n in enumerate(dataset.counts.tolist()) for row in range(n)]
        self._reader: Reader | None = None

    def noting(self, in_hand: InHand) -> Self:
        return self

    def __call__(self, number: int) -> RawBatch:
        self._reader = self._reader or Reader(self._dataset)
        read = self._reader.read if self._checked else self._reader.fetch
        first = number * RAW_BATCH % len(self._places)
        samples = [read(*place) for place in self._places[first : first + RAW_BATCH]]
        data = np.frombuffer(b"".join(samples), np.uint8)
        return RawBatch(torch.from_numpy(data.copy()), torch.tensor([len(sample) for sample in samples]))


def measure_raw(root: Path, passes: int, workers: int, *, checked: bool) -> float:
    """Samples per second of wall time, after the first has arrived."""
    dataset = open_dataset(root)
    total = passes * len(dataset)
    if workers:
        shared = RAW_BATCH * RAW_BYTES
        make = RawBatches(dataset, checked=checked)
        batches = numbered(make, 0, workers=workers, pin_memory=False, shared_bytes=shared)
        next(batches)
        start = time.perf_counter()
        done = 0
        while done < total:
            done += len(next(batches).sizes)
        return done / (time.perf_counter() - start)
    reader = Reader(dataset)
    read = reader.read if checked else reader.fetch
    places = [(unit, row) for unit, count in enumerate(dataset.counts.tolist()) for row in range(count)]
    read(*places[0])
    start = time.perf_counter()
    for _ in range(passes):
        for unit, row in places:
            read(unit, row)
    return total / (time.perf_counter() - start)


def measure(what: str, root: Path, passes: int, workers: int) -> float:
    """What a `--measure` process does; the malloc setting is the one that worker processes make."""
    keep_freed_memory()
    torch.set_num_threads(1)
    ours: dict[str, Callable[[], float]] = {
        "crops": lambda: measure_crops(root, passes, MULTI_CROP),
        "small": lambda: measure_crops(root, passes, TWO_SMALL),
        "colour": lambda: measure_colour(root, passes),
        "raw": lambda: measure_raw(root, passes, workers, checked=False),
        "raw-checked": lambda: measure_raw(root, passes, workers, checked=True),
    }
    return ours[what]()


@dataclass(frozen=True)
class Case:
    """One line of the result: ours and its peers on one dataset."""

    what: str
    dataset: str
    workers: int
    passes: int
    peer_passes: int


CASES = [
    Case("crops", "vga", 0, 1, 1),
    Case("crops", "photos", 0, 3, 2),
    Case("colour", "vga", 0, 1, 1),
    Case("colour", "photos", 0, 2, 1),
    Case("small", "small", 0, 3, 0),
    Case("raw", "raw", 0, 4, 1),
    Case("raw-checked", "raw", 0, 1, 0),
    Case("raw", "raw", 1, 20, 1),
    Case("raw", "raw", 2, 20, 1),
    Case("raw-checked", "raw", 2, 5, 0),
]


def commands(case: Case, work: Path, stock: str | None) -> Iterator[tuple[str, list[str]]]:
    root = work / case.dataset
    core = [] if case.workers else ["--core", "0"]
    common = ["--workers", str(case.workers), *core]
    yield (
        "ours",
        [sys.executable, __file__, "--measure", case.what, str(root), "--passes", str(case.passes), *common],
    )
    if case.peer_passes:
        shards = [str(path) for path in sorted(root.glob("shards/*/*.tar"))]
        rest = [str(PEER), case.what, *shards, "--passes", str(case.peer_passes), *common]
        yield "peer here", [sys.executable, *rest]
        if stock is not None:
            yield "peer stock", [stock, *rest]


def run_case(case: Case, work: Path, stock: str | None, rounds: int) -> None:
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, command in commands(case, work, stock):
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            answer = json.loads(out.splitlines()[-1])
            rates.setdefault(f"{name} {answer.get('pillow', '')}".strip(), []).append(answer["rate"])
    workers = f", {case.workers} workers" if case.workers else ""
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], values, strict=True)]
        print(
            f"{case.what:11} {case.dataset}{workers}: {name:26} {statistics.median(values):9.0f}/s "
            f"({min(values):.0f} to {max(values):.0f})"
            + ("" if name == "ours" else f", ours is x{statistics.median(ratios):.2f}"),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs; with --measure, a dataset")
    parser.add_argument("--work", type=Path, default=Path("/tmp/loader-benchmark"))
    parser.add_argument("--stock-python")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", help="crops, colour, small, raw, raw-checked")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--passes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    if options.measure:
        rate = measure(options.measure, options.folder, options.passes, options.workers)
        print(json.dumps({"rate": rate}))
        return
    make_datasets(options.folder, options.work)
    for case in CASES:
        if not options.only or case.what in options.only:
            run_case(case, options.work, options.stock_python, options.rounds)


if __name__ == "__main__":
    main()
