"""Training data from an object store: images/s, first batch, requests per sample, beside webdataset.

    python benchmarks/object_store_training.py --work FOLDER [--images FOLDER] [--rounds 3]
        [--peers-python PYTHON --only whole webdataset litdata mosaicml]

A sealed dataset of 20,000 small JPEGs (those of --images, else drawn ones of 32 x 32) in units of 1,000 is
served by benchmarks/slow_object_server.py with 0, 30 and 100 ms before each answer's first byte. Everybody
reads it twice, batches of 256 with two crops of 32 pixels, cut by the same code, in 4 and 8 workers:

    local       this loader, from the folder: what reading costs nothing
    whole       this loader, windows in the cache
    singly      this loader, a cache that holds no window: one request a sample
    faults      `whole`, with 5 % of the reads refused, cut off or answered 500
    singly-faults
    webdataset  streams the same tars
    litdata     only if named: its loader streams the same images in its own format; --peers-python has
                litdata, mosaicml-streaming, psutil and what this project's crops import
    mosaicml    the same with MosaicML's loader
    bare        obstore alone, 256 ranged GETs in flight; nothing is decoded

Each measurement is a process of its own with empty caches; rounds take turns, and the medians are shown.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from object_store_peers import PEERS
from PIL import Image
from slow_object_server import counts, served

IMAGES, UNIT_ROWS, BATCH, EPOCHS = 20_000, 1_000, 256, 2
CROPS = [{"count": 2, "size": 32, "scale": [0.2, 1.0]}]
OURS = ("local", "whole", "singly", "faults", "singly-faults")
FAULTS = 0.05
MIB = 1 << 20


def make_dataset(work: Path, images: Path | None) -> Path:
    """The sealed dataset, unless it is there."""
    from ingest.crawl.crawl import crawl_shards
    from ingest.plan.settings import CrawlSettings

    if not (work / "data" / "DATASET.json").exists():
        folder = work / "images"
        folder.mkdir(parents=True, exist_ok=True)
        if images is not None:
            found = sorted(path for path in images.rglob("*") if path.suffix in (".jpg", ".png"))
            for number, path in enumerate(random.Random(0).sample(found, IMAGES)):
                shutil.copy(path, folder / f"{number:05d}{path.suffix}")
        else:
            for number in range(IMAGES):
                rough = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
                picture = Image.fromarray(rough).resize((32, 32), Image.Resampling.BICUBIC)
                picture.save(folder / f"{number:05d}.jpg", quality=95)
        settings = CrawlSettings(unit_rows=UNIT_ROWS)
        crawl_shards([str(folder)], work / "data", settings, workers=2, progress=lambda counts: None)
    return work / "data"


def make_peer_data(what: str, root: Path, python: str) -> None:
    """The dataset in the format of one of PEERS, beside it, unless it is there."""
    if not (folder := root.parent / what).exists():
        draft = root.parent / f"{what}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        convert = Path(__file__).with_name("object_store_peers.py")
        subprocess.run([python, convert, what, root, draft], check=True)
        draft.rename(folder)


def ours(root: str, workers: int, cache: Any) -> Iterator[int]:
    """Batches of this loader, as their sizes."""
    import torch

    from pipeline.data.loader import Loader
    from pipeline.recipe.data import Data

    data = Data.model_validate({"root": root, "batch_size": BATCH, "crops": CROPS})
    loader = Loader(
        data, seed=0, rank=0, world_size=1, workers=workers, device=torch.device("cpu"), cache=cache
    )
    steps = EPOCHS * loader.steps_per_epoch
    return (len(batch.keys) for _, batch in islice(loader.from_step(0), steps))


class Cut:
    """What webdataset and PEERS do with a sample: this project's crops, with draws of its own."""

    def __init__(self) -> None:
        from pipeline.data.modality import modality_of
        from pipeline.recipe.data import Data

        data = Data.model_validate({"root": "-", "batch_size": BATCH, "crops": CROPS})
        self.modality = modality_of(data)
        self.draws = np.random.default_rng(0)

    def __call__(self, sample: dict[str, Any]) -> np.ndarray:
        room = self.modality.empty(1)
        draws = self.draws.random((sum(self.modality.counts.values()), self.modality.draws))
        self.modality.cut(
            sample["jpg"] if "jpg" in sample else sample["png"],
            draws,
            {name: of_name[:, 0] for name, of_name in room.items()},
        )
        return room["crops.0"][:, 0]


def webdataset(urls: list[str], workers: int) -> Iterator[int]:
    """Batches of webdataset over the same tars, as their sizes."""
    import torch
    import webdataset as wds

    torch.set_num_threads(1)
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=None, empty_check=False)
        .shuffle(UNIT_ROWS)
        .map(Cut())
        .batched(BATCH, collation_fn=np.stack, partial=True)
        .repeat(EPOCHS)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers)
    return (len(batch) for batch in loader)


async def bare(root: str, ranges: list[tuple[str, int, int]]) -> float:
    """Images/s of obstore alone."""
    import obstore
    from obstore.store import S3Store

    store = S3Store.from_url(root, client_options={"allow_http": True})
    left = iter(ranges)

    async def reader() -> None:
        for name, start, size in left:
            await obstore.get_range_async(store, name, start=start, length=size)

    began = time.perf_counter()
    await asyncio.gather(*(reader() for _ in range(256)))
    return len(ranges) / (time.perf_counter() - began)


def measure(what: str, root: Path, url: str, workers: int) -> dict[str, float]:
    """One measurement, in this process."""
    bucket = f"s3://{root.name}"
    if what in PEERS:
        cut = Cut()
        import_module({"mosaicml": "streaming"}.get(what, what))
        began = time.perf_counter()
        return timed(PEERS[what](f"s3://{what}", cut, BATCH, EPOCHS, workers), began)
    from ingest.dataset.open import open_dataset

    dataset = open_dataset(root)
    units = range(len(dataset.units))
    if what == "bare":
        ranges = []
        for unit in units:
            rows = dataset.unit_rows(unit)
            name = dataset.files.name(unit, "shard")
            ranges += [(name, int(row["offset"]), int(row["size"])) for row in rows]
        random.Random(0).shuffle(ranges)
        return {"rate": asyncio.run(bare(bucket, ranges))}
    import pipeline.data.loader  # noqa: F401 -- what importing takes is not the loader's doing

    began = time.perf_counter()
    if what == "webdataset":
        names = [dataset.files.name(unit, "shard") for unit in units]
        sizes = webdataset([f"{url}/{root.name}/{name}" for name in names], workers)
    else:
        from pipeline.data.node_cache import CachePlace

        limit = 16 * MIB if what.startswith("singly") else 1 << 30
        sizes = ours(str(root) if what == "local" else bucket, workers, CachePlace(limit=limit))
    return timed(sizes, began)


def timed(sizes: Iterator[int], began: float) -> dict[str, float]:
    """Images/s after the first batch, and when that came."""
    next(sizes)
    first, before = time.perf_counter(), cpu_seconds()
    done = 0
    while done < (EPOCHS - 0.1) * IMAGES:  # all processes are still there, to be asked for their CPU time
        done += next(sizes)
    seconds, after = time.perf_counter() - first, cpu_seconds()
    spent = {kind: after[kind] - before.get(kind, 0) for kind in after}
    return {
        "rate": done / seconds,
        "first": first - began,
        "cpu_us": 1e6 * sum(spent.values()) / done,
        "ahead_us": 1e6 * spent.get("ahead", 0) / done,
    }


def cpu_seconds() -> dict[str, float]:
    """CPU time of this process and all below it, those that read ahead apart."""
    spent: dict[str, float] = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            ahead = "pipeline.data.read_ahead" in process.cmdline()
            kind = "ahead" if ahead else "others"
            spent[kind] = spent.get(kind, 0) + sum(times[:4])
    return spent


def one(what: str, root: Path, latency: float, workers: int, python: str) -> dict[str, float]:
    """One measurement, in a process of its own, with a server of its own."""
    share = FAULTS if what.endswith("faults") else 0.0
    with (
        tempfile.TemporaryDirectory() as fresh,
        served(root.parent, latency_ms=latency, fault_share=share) as url,
    ):
        environment = os.environ | {
            "AWS_ENDPOINT_URL": url,
            "S3_ENDPOINT_URL": url,  # MosaicML's name for it
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
            "TMPDIR": fresh,
        }
        command = [python, __file__, "--measure", what, "--root", str(root), "--url", url]
        command += ["--workers", str(workers)]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        images = IMAGES * (1 if what == "bare" else EPOCHS)
        return answer | {"requests": counts(url)["requests"] / images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 30, 100])
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--only", nargs="+", default=[*OURS, "webdataset", "bare"])
    parser.add_argument("--peers-python", default="")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.root, given.url, given.workers[0])))
        return
    root = make_dataset(given.work, given.images)
    pythons = dict.fromkeys(PEERS, given.peers_python)
    for what in set(given.only) & set(PEERS):
        if not given.peers_python:
            parser.error(f"{what} needs --peers-python")
        make_peer_data(what, root, pythons[what])
    for latency in given.latency:
        for workers in given.workers:
            found: dict[str, list[dict[str, float]]] = {what: [] for what in given.only}
            for _ in range(given.rounds):
                for what in given.only:
                    found[what].append(one(what, root, latency, workers, pythons.get(what, sys.executable)))
            for what, rounds in found.items():
                rates = [each["rate"] for each in rounds]
                print(
                    f"{latency:5.0f} ms {workers:2d} workers {what:14} "
                    f"{statistics.median(rates):7,.0f} images/s ({min(rates):,.0f} to {max(rates):,.0f})"
                    f"  first {statistics.median(each.get('first', 0) for each in rounds):5.2f} s"
                    f"  {statistics.median(each.get('cpu_us', 0) for each in rounds):4.0f} us CPU/image"
                    f" ({statistics.median(each.get('ahead_us', 0) for each in rounds):.0f} ahead)"
                    f"  requests/sample {statistics.median(each['requests'] for each in rounds):.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
