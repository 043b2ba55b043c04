"""Claim: fine-tuning is as fast as timm's train script, extracting features twice as fast as a plain loop.

    python benchmarks/transfer_speed.py finetune FOLDER --photos PHOTOS --target PEERS [--rounds 5]
    python benchmarks/transfer_speed.py features FOLDER --photos PHOTOS --target PEERS --trunk none --size 224

PEERS is where `pip install --target PEERS --no-deps timm torchvision` has put the peers. Both are shown the
same JPEGs of 640 x 480, with the same trunk, size, batch, threads and workers.

Fine-tuning: bicubic crops, flips, mixup, label smoothing, SGD with Nesterov and an average of the weights.
Both train in one process and take turns step by step, loading included (`--workers 0`): a busy machine slows
neighbours alike. Features: whole extractions in turns; `--trunk none` is a mean of pixels, where all that
counts is how images get there, as it does on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from loader import make_vga
from torch import nn
from transfer_speed_peer import MEAN, STD, Clock, open_target
from transfer_speed_peer import finetune as peer_finetune

from cluster.rank.preempt import PreemptionFlag
from cluster.rank.process import MALLOC_SETTINGS, OPENMP_SETTINGS
from cluster.rank.torch_dist import World
from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import open_dataset
from ingest.plan.settings import CrawlSettings
from pipeline.data.evaluation import Preprocessing
from pipeline.models.trunk import build_trunk
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.trunk import Architecture
from pipeline.train.loop import train
from pipeline.train.run_recipe import pin_dataset
from pipeline.train.setup import set_up
from pipeline.transfer.extract import write_features

CLASSES = 10
PLAIN = {"jitter_probability": 0.0, "grey_probability": 0.0, "blur_probability": 0.0}
CPU = torch.device("cpu")


def make_data(photos: Path, folder: Path) -> None:
    """FOLDER/images with a folder for each class, and FOLDER/data, a dataset of the same files."""
    if (folder / "data" / "DATASET.json").exists():
        return
    for number, path in enumerate(sorted(make_vga(photos, folder / "vga").iterdir())):
        place = folder / "images" / f"class{number % CLASSES}" / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.hardlink_to(path)
    settings = CrawlSettings(unit_rows=500)
    crawl_shards([str(folder / "images")], folder / "data", settings, workers=2, progress=lambda counts: None)


class Turns:
    """Two trainings in turns, a step each; `spent` has the CPU seconds of each step."""

    def __init__(self, names: tuple[str, str], steps: int) -> None:
        self._names, self._steps = names, steps
        self._turn, self._changed = names[0], threading.Condition()
        self.spent: dict[str, list[float]] = {name: [] for name in names}

    def run(self, name: str, training: Callable[[Callable[[int], None]], None]) -> None:
        """One of them, in a thread of its own, until both have done their steps."""
        self._wait(name)
        with contextlib.suppress(StopIteration):
            training(lambda done: self._step(name))

    def _wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == name)
        self._began = time.process_time()

    def _step(self, name: str) -> None:
        self.spent[name].append(time.process_time() - self._began)
        with self._changed:
            self._turn = self._names[self._turn == self._names[0]]
            self._changed.notify_all()
        if len(self.spent[name]) == self._steps:
            raise StopIteration
        self._wait(name)


def in_turns(options: argparse.Namespace, folder: Path) -> None:
    """Steps of both, and the ratio of neighbours."""
    torch.set_num_threads(options.threads)
    open_target(str(options.target))
    turns = Turns(("theirs", "ours"), options.warmup + options.steps)
    of_peer = argparse.Namespace(**vars(options) | {"folder": str(options.folder / "images")})
    threads = [
        threading.Thread(target=turns.run, args=("theirs", lambda step: peer_finetune(of_peer, step))),
        threading.Thread(target=turns.run, args=("ours", lambda step: finetune(options, folder, step))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = {name: found[options.warmup :] for name, found in turns.spent.items()}
    for name, found in spent.items():
        rates = [options.batch / seconds for seconds in found]
        middle = statistics.median(rates)
        print(f"{name}: {middle:.1f} images per CPU second ({min(rates):.1f} to {max(rates):.1f})")
    ratios = [theirs / ours for theirs, ours in zip(spent["theirs"], spent["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"ours / theirs: {middle:.2f} (quartiles {low:.2f} to {high:.2f}) of {len(ratios)} pairs of steps")


def finetune(options: argparse.Namespace, folder: Path, step: Callable[[int], None]) -> None:
    recipe = PretrainRecipe.model_validate(
        {
            "data": {
                "root": str(options.folder / "data"),
                "batch_size": options.batch,
                "crops": [
                    {
                        "count": 1,
                        "size": options.size,
                        "scale": [0.08, 1.0],
                        "interpolation": "bicubic",
                        "photometric": PLAIN,
                    }
                ],
            },
            "trunk": {"name": options.trunk},
            "method": {"name": "classification", "label_smoothing": 0.1, "mixup": 0.1, "ema": 0.9998},
            "optim": {"name": "sgd", "nesterov": True, "lr": 0.01, "weight_decay": 2e-5},
            "train": {"steps": 10 * (options.warmup + options.steps)},
            "run": {"workers": options.workers, "device": "cpu", "log_every": 10, "checkpoint_minutes": 60},
        }
    )
    alone = World(rank=0, size=1, local_rank=0, device=CPU, group=None, control=None)
    training = set_up(pin_dataset(recipe, folder), folder, alone)
    profile: Any = SimpleNamespace(step=step, close=lambda: None)
    train(replace(training, profile=profile), PreemptionFlag(training.run))


def features(options: argparse.Namespace, folder: Path) -> None:
    if options.trunk == "none":
        trunk: nn.Module = nn.Sequential(nn.AvgPool2d(28), nn.Flatten())
        dim = 3 * (options.size // 28) ** 2
    else:
        built = build_trunk(Architecture(name=options.trunk))
        trunk, dim = built, built.feature_dim
    shown = Preprocessing(
        image_size=options.size,
        resize=options.size * 8 // 7,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
    )
    dataset, clock, seen = open_dataset(options.folder / "data"), Clock(), []

    def busy(what: str) -> None:
        seen.append(what)
        if len(seen) == 1:
            clock.start()

    write_features(
        trunk,
        dataset,
        folder / "features",
        dim=dim,
        preprocessing=shown,
        workers=options.workers,
        device=CPU,
        batch_size=options.batch,
        busy=busy,
    )
    clock.tell(len(dataset) - options.batch)


def measure(script: Path, options: argparse.Namespace, *words: str) -> dict[str, float]:
    settings = [f"--{name}={getattr(options, name)}" for name in ("size", "batch", "workers")]
    command = [sys.executable, str(script), *words, f"--target={options.target}", f"--trunk={options.trunk}"]
    environment = os.environ | MALLOC_SETTINGS | OPENMP_SETTINGS | {"OMP_NUM_THREADS": str(options.threads)}
    answer = subprocess.run(
        [*command, *settings], env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def in_rounds(options: argparse.Namespace) -> None:
    """Whole extractions of both, each in a process of its own."""
    ratios: dict[str, list[float]] = {"per_cpu_second": [], "per_second": []}
    peer = Path(__file__).with_name("transfer_speed_peer.py")
    for _ in range(options.rounds):
        ours = measure(Path(__file__), options, "features", str(options.folder), "--here")
        theirs = measure(peer, options, str(options.folder / "images"))
        print(json.dumps({"ours": ours, "theirs": theirs}), flush=True)
        for name, found in ratios.items():
            found.append(ours[name] / theirs[name])
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["finetune", "features"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--target", type=Path)
    for name, value in (
        ("size", 128),
        ("batch", 32),
        ("workers", 1),
        ("steps", 10),
        ("warmup", 2),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--trunk", default="resnet18")
    parser.add_argument("--here", action="store_true", help="extract features in this process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.here:
            features(options, Path(folder))
            return
        make_data(options.photos, options.folder)
        if options.what == "finetune":
            in_turns(options, Path(folder))
        else:
            in_rounds(options)


if __name__ == "__main__":
    main()
