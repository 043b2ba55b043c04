"""Claims: a bank in pieces takes each rank its share of the memory, and a step of it does not depend on how
many rows there are; positives in cells are nearly those of all pairs, in a fraction of the time, and those
that are certified are the same.

    python benchmarks/bank.py steps [--rows N] [--ranks 1 2 4]
    python benchmarks/bank.py recall [--rows N]

`steps`: per number of ranks, of a coupled batch of 256 with 1,024 negatives and 32 positives each:
milliseconds of a rank for what a step asks of the bank (draw, fetch, update), and what a rank holds of it;
gloo, one thread each, all on this machine. `recall`: of banks with planted classes, some queries: the share
of the best 32 of all pairs that cells find, the share of rows whose answer is certified and what is found of
theirs, and CPU seconds of both per thousand queries.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed.rows import fetch_rows, own_rows
from pipeline.methods import nearest
from pipeline.methods.bank import Bank, draw_negatives

BATCH, NEGATIVES, POSITIVES, DIM = 256, 1024, 32, 128
STEPS, WARM_UP = 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["steps", "recall"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    arguments = parser.parse_args()
    if arguments.what == "recall":
        recall(arguments.rows or 100_000)
        return
    rows = arguments.rows or 1_000_000
    print("| ranks | bank of a rank, MB | draw, ms | fetch, ms | update, ms | memory while stepping, MB |")
    print("|---|---|---|---|---|---|")
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_steps, (ranks, rows, Path(folder)), nprocs=ranks)


def _steps(rank: int, ranks: int, rows: int, folder: Path) -> None:
    torch.set_num_threads(1)
    group = None
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        group = dist.group.WORLD
    bank = _bank_of(torch.empty(len(own_rows(rows, group)), 2, DIM), rows, group)
    bank.chunk.normal_()
    positives = torch.randint(0, rows, (len(bank.range), POSITIVES), dtype=torch.int32)
    before = _peak_mb()
    spent: dict[str, list[float]] = {"draw": [], "fetch": [], "update": []}
    for step in range(STEPS):
        positions = np.random.default_rng(step).choice(rows, BATCH, replace=False)
        here = torch.from_numpy(positions[rank * BATCH // ranks : (rank + 1) * BATCH // ranks].copy())
        times = [time.process_time()]
        mine = here.sort().values
        others = fetch_rows(positives, mine, rows=rows, group=group).numpy()
        drawn = draw_negatives(mine.numpy(), others, samples=rows, count=NEGATIVES, seed=0, number=step)
        times.append(time.process_time())
        bank.fetch(torch.cat([mine[:, None], torch.from_numpy(others), torch.from_numpy(drawn)], 1))
        times.append(time.process_time())
        seen = F.normalize(torch.randn(len(mine), 2, DIM), dim=-1)
        bank.update([(mine, seen)], momentum=0.5)
        times.append(time.process_time())
        for name, start, end in zip(spent, times[:-1], times[1:], strict=True):
            spent[name].append(1000 * (end - start))
    if rank == 0:
        told = " | ".join(_median(each[WARM_UP:]) for each in spent.values())
        print(f"| {ranks} | {bank.chunk.nbytes / 1e6:.0f} | {told} | {_peak_mb() - before:.0f} |", flush=True)
    if group is not None:
        dist.barrier()
        dist.destroy_process_group()


def recall(rows: int) -> None:
    """Many small classes, tight and loose, few large ones with much noise, and none at all."""
    torch.set_num_threads(1)
    print(
        "| rows | classes | noise | cells | scanned | recall of 32 | certified | their recall "
        "| all pairs, s per 1,000 | cells, s per 1,000 |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for classes, noise in ((rows // 500, 0.1), (rows // 500, 1.0), (50, 2.0), (rows, 1.0)):
        bank = _bank_of(_planted(rows, classes, noise), rows, None)
        queries = torch.arange(0, rows, rows // 1024)[: nearest.QUERIES]
        before = time.process_time()
        exact = nearest.nearest(bank, queries, how="consensus", count=POSITIVES)
        of_pairs = 1000 * (time.process_time() - before) / len(queries)
        before = time.process_time()
        everywhere = nearest.nearest_in_cells(
            bank, how="consensus", count=POSITIVES, seed=0, progress=lambda: None
        )
        in_cells = 1000 * (time.process_time() - before) / rows
        found, certified = everywhere.rows[queries].long(), everywhere.certified[queries]
        alike = (found[:, :, None] == exact[:, None, :]).any(-1).double()
        of_those = f"{alike[certified].mean():.4f}" if certified.any() else "-"
        cells = nearest.cell_count(rows)
        print(
            f"| {rows:,} | {classes} | {noise} | {cells} | {min(1, nearest.PROBES / cells):.1%} "
            f"| {alike.mean():.4f} | {everywhere.certified.double().mean():.1%} | {of_those} "
            f"| {of_pairs:.2f} | {in_cells:.2f} |",
            flush=True,
        )


def _planted(rows: int, classes: int, noise: float) -> Tensor:
    """Directions of both modalities around those of a class, (rows, 2, DIM); noise beside 1 for the class."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(classes, 2, DIM, generator=generator), dim=-1)
    own = F.normalize(torch.randn(rows, 2, DIM, generator=generator), dim=-1)
    return F.normalize(centres[torch.randint(classes, (rows,), generator=generator)] + noise * own, dim=-1)


def _bank_of(chunk: Tensor, rows: int, group: dist.ProcessGroup | None) -> Bank:
    with torch.device("meta"):
        bank = Bank(rows, DIM, dtype=torch.float32, group=group)
    bank.rows = chunk
    return bank


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
