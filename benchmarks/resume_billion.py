"""Claim: resuming at a billion samples costs under 1 s and 10 MB.

    python benchmarks/resume_billion.py [--rounds 9]

A synthetic sealed dataset on disk: the list of 61,036 units of 16,384 samples, as a crawl seals it, without
the shards. A round is a process of its own that has imported everything: it constructs the `Loader` for rank
0 of 1 (batch 512) or of 8 (batch 4,096), which opens the dataset and checks its list, and locates rank 0's
512 samples of a batch in the middle of epoch 3, down to the names of their shards. Prints the median seconds,
the spread, and the peak of new memory: Python's and NumPy's (tracemalloc, in a round of its own, for it slows
things) and Arrow's. Reading the samples' own Parquet rows and pixels is not part of it.
"""

import argparse
import hashlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ingest.dataset import layout
from ingest.dataset.records import Pointer, SealedHead
from ingest.dataset.schema import UNITS_SCHEMA
from pipeline.data.loader import Loader
from pipeline.recipe.data import Data

UNITS, UNIT_SAMPLES = 61_036, 16_384
ROWS = 512
CROPS = [{"count": 2, "size": 224, "scale": [0.14, 1.0]}]


def make_sealed_list(folder: Path) -> None:
    """What `ingest.dataset.commit.seal` writes for a billion samples; the digests are random."""
    rng = np.random.default_rng(0)
    root = rng.bytes(32).hex()
    digests = [rng.bytes(32) for _ in range(2 * UNITS)]
    constant = {"generation": 0, "rows": UNIT_SAMPLES, "kept": UNIT_SAMPLES, "rejected": 0, "failed": 0}
    columns: dict[str, object] = {"unit": range(UNITS)} | {
        name: [value] * UNITS for name, value in constant.items()
    }
    for kind, extension, own in (("shard", "tar", digests[:UNITS]), ("meta", "parquet", digests[UNITS:])):
        columns[kind] = [
            f"{kind}s/{unit % 4096:03x}/{unit:08d}-{digest.hex()[:8]}.{extension}"
            for unit, digest in enumerate(own)
        ]
        columns[f"{kind}_bytes"] = rng.integers(1 << 28, 1 << 31, UNITS)
        columns[f"{kind}_sha256"] = own
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=UNITS_SCHEMA), buffer, compression="zstd", row_group_size=4_096)
    listing = buffer.getvalue()
    samples = UNITS * UNIT_SAMPLES
    head = SealedHead(
        format=1,
        root=root,
        generations=(0,),
        fingerprints=("",),
        units=UNITS,
        planned=samples,
        kept=samples,
        rejected={},
        failed={},
        bytes=0,
        units_sha256=hashlib.sha256(listing).hexdigest(),
    )
    (folder / "sealed").mkdir()
    (folder / layout.sealed_name(root, "parquet")).write_bytes(listing)
    (folder / layout.sealed_name(root, "json")).write_bytes(head.to_bytes())
    (folder / layout.DATASET).write_bytes(Pointer(format=1, sealed=root).to_bytes())
    print(f"{UNITS * UNIT_SAMPLES:,} samples, a list of {len(listing) / 1e6:.1f} MB", flush=True)


def resume(folder: Path, ranks: int) -> int:
    """Construct rank 0's loader and locate its samples; returns how many there are."""
    data = Data.model_validate({"root": str(folder), "batch_size": ROWS * ranks, "crops": CROPS})
    loader = Loader(data, seed=0, rank=0, world_size=ranks, workers=0, device=torch.device("cpu"))
    places = set(loader.locate(3 * loader.steps_per_epoch + loader.steps_per_epoch // 2))
    for unit_index in {unit_index for unit_index, _ in places}:
        loader.dataset.shard_path(unit_index)
    return len(places)


def measure(folder: Path, ranks: int, *, memory: bool) -> dict[str, float]:
    """One round, in this process."""
    if memory:
        tracemalloc.start()
    before = time.perf_counter()
    located = resume(folder, ranks)
    seconds = time.perf_counter() - before
    if located != ROWS:
        raise RuntimeError(f"{located} samples, not {ROWS}")
    return {
        "seconds": seconds,
        "python": tracemalloc.get_traced_memory()[1] / 1e6,
        "arrow": (pa.default_memory_pool().max_memory() or 0) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.ranks, memory=options.memory)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_sealed_list(Path(folder))
        for ranks in (1, 8):
            command = [sys.executable, __file__, "--measure", folder, "--ranks", str(ranks)]
            seconds = [_round(command)["seconds"] for _ in range(options.rounds)]
            peak = _round([*command, "--memory"])
            print(
                f"{ranks} ranks: {1e3 * statistics.median(seconds):.0f} ms "
                f"({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f}), at most {peak['python']:.1f} MB of "
                f"Python and NumPy and {peak['arrow']:.1f} MB of Arrow",
                flush=True,
            )


def _round(command: list[str]) -> dict[str, float]:
    values: dict[str, float] = json.loads(subprocess.check_output(command, text=True))
    return values


if __name__ == "__main__":
    main()
