"""Claim: a training that is killed at any moment goes on as if it had not been (T3).

    python benchmarks/training_soak.py [--strategy ddp|fsdp2|fairscale] [--kills 200] [--changes 20]

First, 4 gloo ranks train a tiny RegNet with SwAV in float32. They are killed with SIGKILL at random moments,
all at once or one before the others, and started again with the same recipe in the same folder, until the run
is complete. Its final tensors and its metrics must equal the uninterrupted run's, bit for bit.

Then copies of a float64 run of 4 ranks, cut back to one of its checkpoints, go on with 1, 2 and 3 ranks. The
batches must be the same samples in the same order, and the losses of 10 steps within 1e-9 of the 4 ranks'.

Exits with 1 if anything differs.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests" / "pipeline"))
from tiny_training import make_dataset, make_values

from pipeline.checkpoint.files import latest, newest_first, read_tensors, step_of

RANKS = 4
CHANGED_STEPS, CHANGED_RUN = 10, 40
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "pipeline.train.loop"])


class Ranks:
    """The ranks of one start, as processes."""

    def __init__(self, world: int, recipe: dict[str, Any], folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(exist_ok=True)
        place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self._processes = [
            _context.Process(target=_rank, args=(rank, place, recipe, str(folder))) for rank in range(world)
        ]
        for process in self._processes:
            process.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether all ended within the time.

        Raises:
            RuntimeError: one failed.
        """
        end = None if seconds is None else time.monotonic() + seconds
        for process in self._processes:
            process.join(None if end is None else max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self._processes]
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}")
        return None not in codes

    def kill(self, chance: random.Random) -> str:
        """SIGKILL to all, as by a power cut; or to one first, and then to the others, as launchers do."""
        one_first = chance.random() < 0.5
        if one_first:
            chance.choice(self._processes).kill()
            time.sleep(chance.uniform(0, 0.5))
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        return "one first" if one_first else "all at once"


def _rank(rank: int, place: dict[str, str], recipe: dict[str, Any], folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **place}
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as sys.stderr:
        from pipeline.data.loader import Loader
        from pipeline.train.loop import run_pretrain

        keys, augment = [], Loader.augment

        def noted(self: Any, batch: Any, **options: Any) -> Any:
            keys.append(batch.keys.tolist())
            return augment(self, batch, **options)

        Loader.augment = noted  # type: ignore[method-assign]
        run_pretrain(recipe, folder)
        Path(folder, f"keys-{rank}.json").write_text(json.dumps(keys))


def values(data: Path, strategy: str, *, steps: int, precision: str, keep: int) -> dict[str, Any]:
    made = make_values(data, train={"steps": steps, "strategy": strategy, "precision": precision})
    made["run"] |= {"checkpoint_every_steps": 3, "keep_last": keep}
    return made


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def batches(folder: Path, world: int) -> list[list[int]]:
    """The keys of every batch that the last start read, over all ranks."""
    parts = [json.loads((folder / f"keys-{rank}.json").read_text()) for rank in range(world)]
    return [[key for part in batch for key in part] for batch in zip(*parts, strict=True)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest(folder)
    if checkpoint is None:
        raise RuntimeError(f"{folder} has no checkpoint")
    return read_tensors(checkpoint, prefix="")


def kill_again_and_again(recipe: dict[str, Any], kills: int, chance: random.Random, folder: Path) -> bool:
    whole, broken = folder / "whole", folder / "broken"
    started = time.monotonic()
    Ranks(RANKS, recipe, whole).wait()
    per_step = (time.monotonic() - started) / recipe["train"]["steps"]
    print(f"uninterrupted: {recipe['train']['steps']} steps of {1000 * per_step:.0f} ms", flush=True)
    kinds: Counter[str] = Counter()
    starts, started = 1, time.monotonic()
    ranks = Ranks(RANKS, recipe, broken)
    while kinds.total() < kills and not ranks.wait(chance.uniform(0, 2 + 10 * per_step)):
        kinds[ranks.kill(chance)] += 1
        ranks = Ranks(RANKS, recipe, broken)
        starts += 1
    ranks.wait()
    seconds = time.monotonic() - started
    print(f"{kinds.total()} of {kills} kills ({dict(kinds)}), {starts} starts in {seconds:.0f} s", flush=True)
    a, b = tensors(whole), tensors(broken)
    same_rows = (whole / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    same_tensors = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    told = {True: "equal", False: "DIFFER"}
    print(f"metrics {told[same_rows]}, tensors {told[same_tensors]}", flush=True)
    return same_rows and same_tensors and kinds.total() == kills


def change_ranks(recipe: dict[str, Any], changes: int, chance: random.Random, folder: Path) -> bool:
    origin = folder / "origin"
    Ranks(RANKS, recipe, origin).wait()
    expected, keys = rows(origin), batches(origin, RANKS)
    worst, same_batches = 0.0, True
    for number in range(changes):
        copy, world = folder / "copy", number % 3 + 1
        shutil.copytree(origin, copy)
        last = chance.choice([3, 6, 9, 12, 15, 18, 21, 24, 27, 30])
        for checkpoint in newest_first(copy / "checkpoints"):
            if step_of(checkpoint) > last:
                shutil.rmtree(checkpoint)
        Ranks(world, recipe, copy).wait()
        same_batches &= batches(copy, world) == keys[last:]
        pairs = list(zip(rows(copy), expected, strict=True))[last : last + CHANGED_STEPS]
        worst = max(worst, *(abs(one["loss"] - other["loss"]) for one, other in pairs))
        shutil.rmtree(copy)
    print(
        f"{changes} changes from {RANKS} to 1, 2 or 3 ranks: "
        f"batches {'equal' if same_batches else 'DIFFER'}, losses of {CHANGED_STEPS} steps within {worst:.1e}"
    )
    return same_batches and worst <= 1e-9


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--strategy", choices=("ddp", "fsdp2", "fairscale"), default="fsdp2")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--steps", type=int, help="of the killed run; by default 8 for each kill")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, strategy, same = random.Random(options.seed), options.strategy, True
    with tempfile.TemporaryDirectory(prefix="training-soak-") as name:
        folder = Path(name)
        data = make_dataset(folder)
        if options.kills:
            steps = options.steps or 8 * options.kills
            recipe = values(data, strategy, steps=steps, precision="fp32", keep=2)
            same &= kill_again_and_again(recipe, options.kills, chance, folder)
        if options.changes:
            recipe = values(data, strategy, steps=CHANGED_RUN, precision="fp64", keep=CHANGED_RUN)
            same &= change_ranks(recipe, options.changes, chance, folder)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
