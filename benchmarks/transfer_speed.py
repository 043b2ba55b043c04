"""Claim: fine-tuning is as fast as timm's train script, extracting features twice as fast as a plain loop.

    python benchmarks/transfer_speed.py finetune FOLDER --photos PHOTOS --target PEERS [--rounds 5]
    python benchmarks/transfer_speed.py features FOLDER --photos PHOTOS --target PEERS --trunk none --size 224

PEERS is where `pip install --target PEERS --no-deps timm torchvision` has put the peers. Both are shown the
same JPEGs of 640 x 480, with the same trunk, size, batch, threads, workers and settings of malloc and OpenMP,
in turns. Fine-tuning: bicubic crops, flips, mixup, label smoothing, SGD with Nesterov and an
average of the weights. Features: `--trunk none` is a mean of pixels, where all that counts is how images get
there, as it does on a GPU. Prints the median and range of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from loader import make_vga
from torch import nn
from transfer_speed_peer import MEAN, STD, Clock

from cluster.rank.preempt import PreemptionFlag
from cluster.rank.process import MALLOC_SETTINGS, OPENMP_SETTINGS
from cluster.rank.torch_dist import World
from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import open_dataset
from ingest.plan.settings import CrawlSettings
from pipeline.data.evaluation import Preprocessing
from pipeline.models.trunk import build_trunk
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.trunk import Trunk
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


def finetune(options: argparse.Namespace, folder: Path) -> None:
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
            "train": {"steps": options.warmup + options.steps + 1},
            "run": {"workers": options.workers, "device": "cpu", "log_every": 10, "checkpoint_minutes": 60},
        }
    )
    alone = World(rank=0, size=1, local_rank=0, device=CPU, group=None, control=None)
    training, clock = set_up(pin_dataset(recipe, folder), folder, alone), Clock()

    def step(done: int) -> None:
        if done == options.warmup:
            clock.start()
        if done == options.warmup + options.steps:
            clock.tell(options.steps * options.batch)

    profile: Any = SimpleNamespace(step=step, close=lambda: None)
    train(replace(training, profile=profile), PreemptionFlag())


def features(options: argparse.Namespace, folder: Path) -> None:
    if options.trunk == "none":
        trunk: nn.Module = nn.Sequential(nn.AvgPool2d(28), nn.Flatten())
        dim = 3 * (options.size // 28) ** 2
    else:
        built = build_trunk(Trunk(name=options.trunk))
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
    settings = [
        f"--{name}={getattr(options, name)}" for name in ("size", "batch", "workers", "steps", "warmup")
    ]
    command = [sys.executable, str(script), options.what, str(options.folder), f"--trunk={options.trunk}"]
    environment = os.environ | MALLOC_SETTINGS | OPENMP_SETTINGS | {"OMP_NUM_THREADS": str(options.threads)}
    answer = subprocess.run(
        [*command, *settings, *words], env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["finetune", "features"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--target", type=Path)
    for name, value in (("size", 128), ("batch", 32), ("workers", 1), ("steps", 6), ("warmup", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--trunk", default="resnet18")
    parser.add_argument("--here", action="store_true", help="measure ours in this process")
    options = parser.parse_args()
    if options.here:
        with tempfile.TemporaryDirectory() as folder:
            {"finetune": finetune, "features": features}[options.what](options, Path(folder))
        return
    make_data(options.photos, options.folder)
    peer = Path(__file__).with_name("transfer_speed_peer.py")
    peers_images = argparse.Namespace(**vars(options) | {"folder": options.folder / "images"})
    ratios: dict[str, list[float]] = {"per_cpu_second": [], "per_second": []}
    for _ in range(options.rounds):
        ours = measure(Path(__file__), options, "--here")
        theirs = measure(peer, peers_images, "--target", str(options.target))
        print(json.dumps({"ours": ours, "theirs": theirs}), flush=True)
        for name, found in ratios.items():
            found.append(ours[name] / theirs[name])
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
