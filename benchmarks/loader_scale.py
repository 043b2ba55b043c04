"""Claim: datasets of any size load at the speed of a small one, in memory that does not grow.

    python benchmarks/loader_scale.py --work FOLDER [--rounds 3] [--before CHECKOUT]

Sealed datasets of 50,000 to 100 million samples in units of 16,384, with whole metadata and lists: 4.4 GB in
FOLDER, and up to 5.2 GB that the readers of the largest share there. Their images are 65,536 different JPEGs
of 8 pixels in one tar that all units use, drawn at random, so that hardly any sha256 comes twice in a unit.

A measurement is a process that makes batches for one rank (of 1,024 samples for all ranks together) with
worker processes: in an empty temporary folder (cold), and again in what that left (warm), each from opening
the dataset to the first batch; then it goes on until the units are mapped, and counts. Metadata files lie in
the page cache either way. Images/s are those of wall time and, on a machine that others use, of CPU time of
the workers. Private is what psutil calls USS, beyond that of workers that have made empty batches only; "of
their own" leaves out what the kernel can drop, pages of mapped files that no other worker has touched.
`--before` measures another checkout. A line of the output is one measurement, as JSON.
"""

import argparse
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from ingest.dataset import layout
from ingest.dataset.open import Dataset, open_dataset
from ingest.dataset.records import SealedHead
from ingest.dataset.schema import META_SCHEMA, UNITS_SCHEMA
from pipeline.data.in_hand import InHand
from pipeline.data.modality import modality_of
from pipeline.data.order import plan_order, rank_rows
from pipeline.data.rank_batches import RankBatches
from pipeline.data.workers import keep_freed_memory, numbered, start_fork_server
from pipeline.recipe.data import Data

UNIT_SAMPLES, POOL_IMAGES, BATCH = 16_384, 65_536, 1_024
SIZES = (50_000, 300_000, 1_000_000, 1_280_000, 2_000_000, 3_000_000, 14_000_000, 100_000_000)
RANKS = ((0, 1), (3, 8), (17, 512))
CROPS = [{"count": 1, "size": 8, "scale": [0.2, 1.0]}]
POOL = "shards/pool.tar"
MOST_BATCHES = 2_000


def make_pool(folder: Path, images: int) -> None:
    """Images end to end, and where each lies."""
    rng = np.random.default_rng(0)
    encoded = []
    for pixels in rng.integers(0, 256, (images, 8, 8, 3), np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg")
        encoded.append(buffer.getvalue())
    (folder / POOL).parent.mkdir(parents=True)
    (folder / POOL).write_bytes(b"".join(encoded))
    sizes = np.array([len(image) for image in encoded], np.uint64)
    digests = np.frombuffer(b"".join(hashlib.sha256(image).digest() for image in encoded), "V32")
    np.savez(folder / "pool.npz", sizes=sizes, digests=digests.view(np.uint8).reshape(-1, 32))


def make_unit(folder: Path, unit: int, samples: int) -> tuple[int, int, str, int, bytes]:
    """Write a unit's metadata; returns its row of the sealed list: unit, samples, name, bytes, sha256."""
    pool = np.load(folder / "pool.npz")
    offsets = np.cumsum(pool["sizes"]) - pool["sizes"]
    drawn = np.random.default_rng((unit, samples)).integers(0, len(offsets), samples)
    digests = pa.py_buffer(pool["digests"][drawn].tobytes())
    eights = pa.array(np.full(samples, 8), pa.uint32())
    columns: dict[str, Any] = {
        name: pa.nulls(samples, META_SCHEMA.field(name).type) for name in META_SCHEMA.names
    }
    columns |= dict.fromkeys(("width", "height", "original_width", "original_height"), eights)
    columns |= {
        "unit": pa.array(np.full(samples, unit), pa.uint32()),
        "slot": pa.array(np.arange(samples), pa.uint32()),
        "offset": pa.array(offsets[drawn], pa.uint64()),
        "size": pa.array(pool["sizes"][drawn], pa.uint64()),
        "sha256": pa.Array.from_buffers(pa.binary(32), samples, [None, digests]),
        "status": pa.array(["kept"] * samples),
        "retryable": pa.array(np.zeros(samples, bool)),
        "url": pa.array([f"{unit:08d}{slot:05d}.jpg" for slot in range(samples)]),
        "labels": pa.array([[]] * samples, META_SCHEMA.field("labels").type),
    }
    buffer = io.BytesIO()
    delta = {"offset": "DELTA_BINARY_PACKED", "slot": "DELTA_BINARY_PACKED", "url": "DELTA_BYTE_ARRAY"}
    pq.write_table(
        pa.table(columns, schema=META_SCHEMA),
        buffer,
        compression="zstd",
        row_group_size=samples,
        use_dictionary=["format", "status", "reason", "labels.list.element"],
        column_encoding=delta,
    )
    data = buffer.getvalue()
    digest = hashlib.sha256(data)
    name = layout.meta_name(unit, digest.hexdigest())
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return unit, samples, name, len(data), digest.digest()


def seal_units(folder: Path, units: Sequence[tuple[int, int, str, int, bytes]]) -> str:
    """A sealed list of some of the folder's units, as `ingest.dataset.seal` writes it; returns its root."""
    numbers, samples, names, sizes, digests = zip(*units, strict=True)
    same = {
        "generation": 0,
        "rejected": 0,
        "failed": 0,
        "shard": POOL,
        "shard_bytes": 0,
        "shard_sha256": bytes(32),
    }
    columns = {name: [value] * len(units) for name, value in same.items()}
    columns |= {"unit": numbers, "rows": samples, "kept": samples}
    columns |= {"meta": names, "meta_bytes": sizes, "meta_sha256": digests}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=UNITS_SCHEMA), buffer, compression="zstd", row_group_size=4_096)
    listing = buffer.getvalue()
    digest = hashlib.sha256(listing).hexdigest()
    head = SealedHead(
        format=1,
        root=digest,
        generations=(0,),
        fingerprints=("",),
        units=len(units),
        planned=sum(samples),
        kept=sum(samples),
        rejected={},
        failed={},
        bytes=0,
        units_sha256=digest,
    )
    (folder / "sealed").mkdir(exist_ok=True)
    (folder / layout.sealed_name(digest, "parquet")).write_bytes(listing)
    (folder / layout.sealed_name(digest, "json")).write_bytes(head.to_bytes())
    return digest


def make_datasets(folder: Path, sizes: Sequence[int], *, images: int) -> dict[int, str]:
    """Datasets of these sizes, which share their units but the last of each; returns their roots."""
    make_pool(folder, images)
    units_of = {size: _units(size) for size in sizes}
    wanted = sorted({unit for units in units_of.values() for unit in units})
    with ProcessPoolExecutor() as pool:
        done = pool.map(make_unit, repeat(folder), *zip(*wanted, strict=True), chunksize=64)
        made = dict(zip(wanted, done, strict=True))
    return {size: seal_units(folder, [made[unit] for unit in units]) for size, units in units_of.items()}


def _units(size: int) -> list[tuple[int, int]]:
    """Unit numbers and their samples."""
    whole, rest = divmod(size, UNIT_SAMPLES)
    return [(unit, UNIT_SAMPLES) for unit in range(whole)] + [(whole, rest)] * (rest > 0)


@dataclass
class Watched:
    """Makes a rank's batches, and writes down how many metadata files that took in each process."""

    make: RankBatches
    folder: Path
    reads: int = -1

    def noting(self, in_hand: InHand) -> Self:
        return replace(self, make=self.make.noting(in_hand))

    def __call__(self, step: int) -> Any:
        if self.reads < 0:
            self.reads, whole = 0, Dataset.unit_rows

            def counted(dataset: Dataset, unit_index: int) -> Any:
                self.reads += 1
                return whole(dataset, unit_index)

            Dataset.unit_rows = counted  # type: ignore[method-assign]
        before = self.reads
        batch = self.make(step)
        if self.reads != before:
            (self.folder / f"reads-{os.getpid()}").write_text(str(self.reads))
        return batch


@dataclass(frozen=True)
class Empty:
    """Makes batches of nothing: what its workers hold is what every worker holds."""

    def noting(self, in_hand: InHand) -> Self:
        return self

    def __call__(self, step: int) -> torch.Tensor:
        return torch.zeros(1)


def open_batches(folder: Path, root: str, rank: int, world: int) -> RankBatches:
    data = Data.model_validate({"root": str(folder), "sealed": root, "batch_size": BATCH, "crops": CROPS})
    dataset = open_dataset(data.root, sealed=data.sealed)
    order = plan_order(samples=len(dataset), batch_size=BATCH, window=data.window, seed=0)
    return RankBatches(dataset, modality_of(data), order, rank_rows(BATCH, rank=rank, world_size=world))


def workers_of_this(count: int) -> list[psutil.Process]:
    """The worker processes, once earlier ones are gone."""
    while True:
        children = [child for server in psutil.Process().children() for child in server.children()]
        if len(children) == count:
            return children
        time.sleep(0.1)


def private_mb(workers: Sequence[psutil.Process]) -> tuple[float, float]:
    """Medians over the workers: USS, and what of it is no mapped file."""
    uss, own = [], []
    for worker in workers:
        rollup = dict(
            line.split(":") for line in Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()[1:]
        )
        kib = {name: int(value.split()[0]) for name, value in rollup.items()}
        uss.append((kib["Private_Clean"] + kib["Private_Dirty"]) / 1e3)
        own.append(kib["Private_Dirty"] / 1e3)
    return statistics.median(uss), statistics.median(own)


def measure(
    folder: Path, root: str, rank: int, world: int, *, workers: int, warm_up: int, images: int
) -> dict[str, float]:
    """One measurement, in this process; the temporary folder is empty."""
    context, temporary = start_fork_server(), Path(tempfile.gettempdir())
    first = context.Process(target=int)  # type: ignore[attr-defined]
    first.start()
    first.join()  # the fork server has imported what workers need
    options: dict[str, Any] = {"workers": workers, "pin_memory": False}
    empty = numbered(Empty(), 0, shared_bytes=1, **options)  # type: ignore[type-var]
    list(islice(empty, 3 * workers))
    idle = private_mb(workers_of_this(workers))
    del empty
    answer: dict[str, float] = {}
    for state in ("cold", "warm"):
        start = time.perf_counter()
        make = open_batches(folder, root, rank, world)
        batches = numbered(Watched(make, temporary), 1, shared_bytes=make.view_bytes, **options)
        next(batches)
        answer[state] = time.perf_counter() - start
        answer[f"{state}_cpu"] = cpu_seconds(workers_of_this(workers)) / workers
        if state == "cold":
            del batches
    list(islice(batches, warm_up))
    count = min(images // make.count, MOST_BATCHES)
    processes = workers_of_this(workers)
    start, cpu, reads = time.perf_counter(), cpu_seconds(processes), reads_so_far(temporary)
    list(islice(batches, count))
    images, cpu = count * make.count, cpu_seconds(processes) - cpu
    answer |= {"rate": images / (time.perf_counter() - start), "cpu_rate": images / cpu}
    reads = reads_so_far(temporary) - reads
    uss, own = private_mb(processes)
    return answer | {"reads": 1e3 * reads / images, "uss": uss - idle[0], "own": own - idle[1]}


def reads_so_far(temporary: Path) -> int:
    """Metadata files that the workers have read, see `Watched`."""
    return sum(int(file.read_text()) for file in temporary.glob("reads-*"))


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def paired(folder: Path, roots: dict[str, str], rank: int, world: int, steps: int) -> None:
    """Print how fast each dataset's batches are made beside the first one's, step by step in one process.

    Other work on the machine slows both alike: the median ratio is steadier than any rate.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    makers = {size: open_batches(folder, root, rank, world) for size, root in roots.items()}
    for make in makers.values():
        for step in range(1, 49):
            make.fill(step, {}, lambda place, draws, out: None)  # its units are mapped
    seconds: dict[str, list[float]] = {size: [] for size in makers}
    for step in range(49, 49 + steps):
        for size, make in makers.items():
            start = time.process_time()
            make(step)
            seconds[size].append(time.process_time() - start)
    first = next(iter(seconds.values()))
    for size, taken in seconds.items():
        # The first half has opened most shards.
        ratios = [one / this for one, this in zip(first, taken, strict=True)][steps // 2 :]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row = {"size": int(size), "rank": rank, "world": world, "ratio": middle, "low": low, "high": high}
        print(json.dumps(row), flush=True)


def measured(options: argparse.Namespace, code: Path, *what: object) -> dict[str, float]:
    """One measurement in a process of its own, of the code in a checkout."""
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", *map(str, what)]
        for name in ("work", "workers", "warm_up", "images"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        environment = os.environ | {"TMPDIR": temporary, "PYTHONPATH": str(code)}
        # The fork server of workers looks for the code where it stands.
        done = subprocess.run(
            command, cwd=code, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return answer


def rows(options: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    """Size, rank and world of a round's measurements, for each rank the first size once more in the end."""
    for rank, world in RANKS:
        if options.world and world not in options.world:
            continue
        for size in (*options.sizes, options.sizes[0]):
            yield size, rank, world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--world", type=int, nargs="*")
    parser.add_argument("--warm-up", type=int, default=48, help="batches, until the units are mapped")
    parser.add_argument("--images", type=int, default=32_768, help="after that")
    parser.add_argument("--before", type=Path, help="a checkout to measure in place of this one")
    parser.add_argument("--paired", type=int, help="steps of one process, each of all sizes in turn")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.work / "data"
    if options.measure:
        sizes = {name: getattr(options, name) for name in ("workers", "warm_up", "images")}
        root, rank, world = options.measure
        print(json.dumps(measure(folder, root, int(rank), int(world), **sizes)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "roots.json"
    if not listed.exists():
        listed.write_text(json.dumps(make_datasets(folder, SIZES, images=POOL_IMAGES)))
    roots = json.loads(listed.read_text())
    if options.paired:
        with tempfile.TemporaryDirectory(dir=options.work) as tempfile.tempdir:
            for rank, world in RANKS:
                sizes = {str(size): roots[str(size)] for size in options.sizes}
                paired(folder, sizes, rank, world, options.paired * min(world, 8))
        return
    options.work = options.work.resolve()
    code = (options.before or Path(__file__).parent.parent).resolve()
    for number in range(options.rounds):
        for size, rank, world in rows(options):
            answer = measured(options, code, roots[str(size)], rank, world)
            row = {"code": code.name, "round": number, "size": size, "rank": rank, "world": world}
            print(json.dumps(row | {key: round(value, 3) for key, value in answer.items()}), flush=True)


if __name__ == "__main__":
    main()
