"""Claim: a checkpoint holds the training up for the copy of its tensors only; hashes and disk come after.

    python benchmarks/checkpoint_stall.py [--recipe seer_regnety_64gf] [--rounds 5]

One rank on the CPU holds the recipe's method with its momenta, and saves in turns in the background and
waiting. Prints bytes, seconds of each, and the stall as a share of the period that Young and Daly give for
64 nodes. On a GPU `gpu_training.py` measures the same beside a step.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from cluster.rank.torch_dist import World
from cluster.typed_yaml import load_recipe
from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.checkpoint.period import young_daly
from pipeline.methods.build import assemble_method
from pipeline.parallel.parallelize import parallelize
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.train.optim import build_optimizer

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), group=None, control=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="seer_regnety_64gf")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    recipe = load_recipe(PretrainRecipe, options.recipe, kind="pretrain")
    with torch.device("meta"):
        method = assemble_method(recipe, total_steps=1, group=None)
    engine = parallelize(method, train=recipe.train, seed=0, rank_rows=recipe.data.batch_size, world=ALONE)
    optimizer = build_optimizer(engine, recipe.optim)
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    stalled, waited = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoints = Checkpoints(
            Path(folder), world=ALONE, method=method, optimizer=optimizer, minutes=60.0,
            failures_per_node_day=0.01, nodes=1, every_steps=None, keep_last=1, keep_every_steps=None,
            start_over=False,
        )  # fmt: skip
        for step in range(0, 2 * options.rounds, 2):
            for wait, seconds in ((False, stalled), (True, waited)):
                before = time.perf_counter()
                checkpoint = checkpoints.save(step + wait, {}, wait=wait)
                seconds.append(time.perf_counter() - before)
                checkpoints.finish()
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
    first, *others = stalled
    stall, whole = statistics.median(others), statistics.median(waited)
    period = young_daly(save_seconds=stall, failures_per_node_day=0.01, nodes=64)
    print(f"{options.recipe}: {size / 1e9:.2f} GB")
    print(f"in the background: stalled {first:.2f} s the first time, then {stall:.2f} s ({_range(others)})")
    print(f"while it waits: {whole:.2f} s ({_range(waited)}), {whole / stall:.1f} times as long")
    print(f"every {period:.0f} s on 64 nodes: {100 * stall / period:.2f} % of the time")


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


if __name__ == "__main__":
    main()
