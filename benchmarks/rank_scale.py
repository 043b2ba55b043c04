"""What a run costs by its number of ranks: counted on this machine with few, and scaled to many.

    python benchmarks/rank_scale.py --ranks 4 8 16

Ranks are forks that meet by gloo on the CPU. Each rank saves its pieces of `--tensors` sharded tensors twice,
as SEER-10B has them with their momenta, and the first rank logs rows of 10 numbers. Open files are those of
rank 0 with the group of all ranks and the one that writes checkpoints; on GPUs there is one of gloo more, and
where they are on several machines, one for each rank in torch's store. TORCH_GLOO_LAZY_INIT=0 has every rank
connected to every other, as was before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from cluster.rank.torch_dist import World, init_process_group
from pipeline.checkpoint.writer import Writer
from pipeline.train.metrics import Metrics

ROWS, NUMBERS = 20, 10


def main() -> None:
    """Print one line per number of ranks, and one that is scaled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--tensors", type=int, default=1_000)
    parser.add_argument("--to", type=int, default=512, help="scale to so many ranks")
    asked = parser.parse_args()
    found = [counted(ranks, asked.tensors) for ranks in asked.ranks]
    few, many = found[0], found[-1]
    slope = {key: (many[key] - few[key]) / (many["ranks"] - few["ranks"]) for key in few}
    scaled = {key: few[key] + slope[key] * (asked.to - few["ranks"]) for key in few}
    # Each rank lists what all have written.
    found.append(scaled | {"names listed": many["names listed"] * (asked.to / many["ranks"]) ** 2})
    print(f"{asked.tensors:,} tensors; the last line is scaled")
    print("  ".join(few))
    for row in found:
        print("  ".join(f"{value:{len(key)}.4g}" for key, value in row.items()))


def counted(ranks: int, tensors: int) -> dict[str, float]:
    """What the ranks of one run counted."""
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), []
        for rank in range(ranks):
            if (child := os.fork()) == 0:
                try:
                    run(rank, ranks, tensors, folder)
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        told: list[dict[str, float]] = [
            json.loads((folder / f"told-{rank}").read_text()) for rank in range(ranks)
        ]
        listed = sum(each.pop("names listed") for each in told)
        return {"ranks": ranks, **told[0], "names listed": listed}


def run(rank: int, ranks: int, tensors: int, folder: Path) -> None:
    """One rank's part."""
    torch.set_num_threads(1)
    os.environ["SUBMIT_STORE"] = str(folder / "store")
    cpu = torch.device("cpu")
    group, control = init_process_group(cpu, rank=rank, size=ranks)
    world = World(rank=rank, size=ranks, local_rank=rank, device=cpu, group=group, control=control)
    mesh = init_device_mesh("cpu", (ranks,))
    pieces: dict[str, Any] = {
        f"method.trunk.block{number}.weight": DTensor.from_local(torch.zeros(2, 4), mesh, [Shard(0)])
        for number in range(tensors)
    }
    writer, events, seconds = Writer(world), Counter[str](), []
    sys.addaudithook(lambda event, about: note(events, event, about))
    for step in (1, 2):
        temporary = folder / f".saving-{step}"
        before = time.process_time()
        writer.write(temporary, pieces, {}, lambda: None)
        seconds.append(time.process_time() - before)
    told: dict[str, float] = {
        "open files": len([*Path("/proc/self/fd").iterdir()]) - 1,
        "CPU s of save 1": seconds[0],
        "of save 2": seconds[1],
        "names listed": events["list"] * ranks / 2,
    }
    if rank == 0:
        events.clear()
        (folder / "run").mkdir()
        metrics = Metrics(folder / "run", step=0, total_steps=ROWS, log_every=1)
        for step in range(1, ROWS + 1):
            metrics.log(step, {f"value{number}": float(number) for number in range(NUMBERS)})
        time.sleep(0.5)  # TensorBoard writes in a thread
        metrics.close()
        told["opens a row"] = events["tensorboard"] / ROWS
    dist.barrier()
    (folder / f"told-{rank}").write_text(json.dumps(told))
    dist.destroy_process_group()


def note(events: Counter[str], event: str, about: tuple[Any, ...]) -> None:
    """Count what this process does with files."""
    if event in ("os.scandir", "os.listdir") and ".saving" in str(about[0]):
        events["list"] += 1
    elif event == "open" and "tfevents" in str(about[0]):
        events["tensorboard"] += 1


if __name__ == "__main__":
    main()
