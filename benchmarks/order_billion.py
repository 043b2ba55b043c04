"""Claim: resuming at a billion samples costs under 1 s and 10 MB.

    python benchmarks/order_billion.py [--rounds 9]

A synthetic index of 61,036 shards of 16,384 samples. A round builds the order, and locates rank 0's 512 of a
batch in the middle of epoch 3: with 1 rank (batch 512) and with 8 (batch 4,096). Prints the median seconds,
the spread, and the peak of newly allocated memory, the list of shard sizes included. Reading the list of
shards from disk, worker processes and the shards' own Parquet rows are not part of it.
"""

import argparse
import statistics
import time
import tracemalloc

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order import epoch_index, global_batch, locate, plan_order, rank_rows

SHARDS, SHARD_SAMPLES = 61_036, 16_384
ROWS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    for ranks in (1, 8):
        seconds = []
        for _ in range(rounds):
            before = time.perf_counter()
            shards, rows = resume(ranks)
            seconds.append(time.perf_counter() - before)
        tracemalloc.start()
        resume(ranks)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        print(
            f"{ranks} ranks, {SHARDS * SHARD_SAMPLES:,} samples: {1e3 * statistics.median(seconds):.1f} ms "
            f"({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}), {peak:.1f} MB at most, "
            f"{len(rows)} samples in {len(np.unique(shards))} shards"
        )


def resume(ranks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What a loader does before it can read: shard and row of each of rank 0's samples."""
    counts = np.full(SHARDS, SHARD_SAMPLES, np.int64)
    order = plan_order(samples=int(counts.sum()), batch_size=ROWS * ranks, window=131_072, seed=0)
    index = epoch_index(order, counts, epoch=3)
    rows = rank_rows(order.batch_size, rank=0, world_size=ranks)
    return locate(index, global_batch(order, epoch=3, step=order.steps_per_epoch // 2, rows=rows))


if __name__ == "__main__":
    main()
