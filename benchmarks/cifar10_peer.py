"""The peer of benchmarks/cifar10.py: lightly's losses, heads, transforms and CIFAR-10 settings.

    python benchmarks/cifar10_peer.py FOLDER [--minutes 15] [--seed 0] [--workers 2] > peer.jsonl

It imports nothing of this project and runs under any Python that has lightly and torchvision. The trunk and
the batches are those of the graph `cifar10_cpu`; the learning rates are those of lightly's own CIFAR-10
benchmark, scaled with the batch as it scales them. As with ours, a trial of 60 steps outside the minutes says
how many steps fit. The cosine follows steps, not epochs: a dozen epochs would hardly have a schedule. Ours
has malloc and OpenMP set up by `submit` (cluster/doctor.py, cluster/rank/process.py); export the same here.

Prints a line of JSON per method: kNN (lightly's own, k = 200, T = 0.1) after the last step, images, seconds
of the training loop, images/s of the median step.
"""

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from lightly.data import LightlyDataset
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, SwaVLoss
from lightly.models import utils
from lightly.models.modules import heads
from lightly.transforms import SimCLRTransform, SwaVTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.benchmarking import knn_predict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.models.regnet import BlockParams, RegNet

BATCHES = {"swav": 256, "barlow_twins": 256, "byol": 128, "simsiam": 128}
TRIAL_STEPS, TRIAL_WARMUP = 60, 20
STEPPING = 0.97  # of the minutes, as in cifar10.py
WIDTH = 256  # of the trunk's features

Step = Callable[[list[Tensor]], Tensor]


def trunk() -> nn.Module:
    """RegNetY of 0.66 M parameters whose stem keeps the resolution."""
    blocks = BlockParams.from_init_params(depth=6, w_0=32, w_a=40, w_m=2.0, group_width=32, se_ratio=0.25)
    network = RegNet(blocks, stem_width=32)
    network.stem[0].stride = (1, 1)
    network.fc = nn.Identity()
    return network


def sgd(network: nn.Module, method: str) -> torch.optim.Optimizer:
    lr = 6e-2 * BATCHES[method] / 128
    return torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def swav() -> tuple[nn.Module, Step, torch.optim.Optimizer]:
    prototypes = heads.SwaVPrototypes(128, 512)
    network = nn.ModuleList([trunk(), heads.SwaVProjectionHead(WIDTH, 512, 128), prototypes])
    loss = SwaVLoss()

    def step(views: list[Tensor]) -> Tensor:
        prototypes.normalize()
        return loss([prototypes(F.normalize(network[1](network[0](view)), dim=1)) for view in views], [])

    lr = 1e-3 * BATCHES["swav"] / 128
    return network, step, torch.optim.Adam(network.parameters(), lr=lr, weight_decay=1e-6)


def barlow_twins() -> tuple[nn.Module, Step, torch.optim.Optimizer]:
    projector = heads.ProjectionHead(
        [(WIDTH, 2048, nn.BatchNorm1d(2048), nn.ReLU(inplace=True)), (2048, 2048, None, None)]
    )
    network = nn.Sequential(trunk(), projector)
    loss = BarlowTwinsLoss()
    return network, lambda views: loss(*map(network, views)), sgd(network, "barlow_twins")


def byol() -> tuple[nn.Module, Step, torch.optim.Optimizer]:
    online = nn.Sequential(trunk(), heads.BYOLProjectionHead(WIDTH, 1024, 256))
    network = nn.Sequential(*online, heads.BYOLPredictionHead(256, 1024, 256))
    target = copy.deepcopy(online).to(memory_format=torch.channels_last)
    utils.deactivate_requires_grad(target)
    loss = NegativeCosineSimilarity()

    def step(views: list[Tensor]) -> Tensor:
        utils.update_momentum(online, target, m=0.99)
        return 0.5 * (loss(network(views[0]), target(views[1])) + loss(network(views[1]), target(views[0])))

    return network, step, sgd(network, "byol")


def simsiam() -> tuple[nn.Module, Step, torch.optim.Optimizer]:
    projector = heads.ProjectionHead(
        [
            (WIDTH, 2048, nn.BatchNorm1d(2048), nn.ReLU(inplace=True)),
            (2048, 2048, nn.BatchNorm1d(2048), None),
        ]
    )
    network = nn.Sequential(trunk(), projector, heads.SimSiamPredictionHead(2048, 512, 2048))
    loss = NegativeCosineSimilarity()

    def step(views: list[Tensor]) -> Tensor:
        first, second = (network[1](network[0](view)) for view in views)
        return 0.5 * (loss(second.detach(), network[2](first)) + loss(first.detach(), network[2](second)))

    return network, step, sgd(network, "simsiam")


METHODS = {"swav": swav, "barlow_twins": barlow_twins, "byol": byol, "simsiam": simsiam}


def batches(folder: Path, method: str, workers: int) -> Iterator[list[Tensor]]:
    """Two views of each image of the batch, epoch after epoch."""
    if method == "swav":
        views = SwaVTransform(
            crop_sizes=(32,), crop_counts=(2,), crop_min_scales=(0.14,), crop_max_scales=(1.0,),
            cj_strength=0.5, gaussian_blur=0,
        )  # fmt: skip
    else:
        views = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0)
    loader = DataLoader(
        LightlyDataset(str(folder), transform=views),
        batch_size=BATCHES[method], shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        for crops, *_ in loader:
            yield [crop.contiguous(memory_format=torch.channels_last) for crop in crops]


def train(method: str, folder: Path, *, steps: int, seed: int, workers: int) -> tuple[nn.Module, list[float]]:
    """The trunk after these steps, and the time before and after each."""
    torch.manual_seed(seed)
    network, step, optimizer = METHODS[method]()
    network = network.to(memory_format=torch.channels_last).train()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    clock = [time.monotonic()]
    for views in itertools.islice(batches(folder, method, workers), steps):
        optimizer.zero_grad()
        step(views).backward()
        optimizer.step()
        schedule.step()
        clock.append(time.monotonic())
    return network[0], clock


def median_step(clock: list[float]) -> float:
    """Seconds."""
    return statistics.median(after - before for before, after in itertools.pairwise(clock))


@torch.no_grad()
def features(network: nn.Module, folder: Path, workers: int) -> tuple[Tensor, Tensor]:
    """Normalised features (N, 256) and labels (N) of every image."""
    network.eval()
    upright = transforms.Compose([transforms.ToTensor(), transforms.Normalize(**IMAGENET_NORMALIZE)])
    loader = DataLoader(LightlyDataset(str(folder), transform=upright), batch_size=256, num_workers=workers)
    found = [(F.normalize(network(images), dim=1), labels) for images, labels, _ in loader]
    return torch.cat([each for each, _ in found]), torch.cat([labels for _, labels in found])


def score(network: nn.Module, folder: Path, workers: int) -> float:
    """kNN top-1 in percent."""
    bank, labels = features(network, folder / "train", workers)
    queries, truth = features(network, folder / "test", workers)
    predict = partial(knn_predict, feature_bank=bank.T, feature_labels=labels, num_classes=10)
    nearest = torch.cat([predict(part)[:, 0] for part in queries.split(1000)])
    return 100 * (nearest == truth).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    folder = arguments.folder
    for method in arguments.methods:
        run = partial(train, method, folder / "train", seed=arguments.seed, workers=arguments.workers)
        _, clock = run(steps=TRIAL_STEPS)
        steps = round(60 * STEPPING * arguments.minutes / median_step(clock[TRIAL_WARMUP:]))
        network, clock = run(steps=steps)
        row = {
            "method": method,
            "knn": round(score(network, folder, arguments.workers), 2),
            "images": steps * BATCHES[method],
            "seconds": round(clock[-1] - clock[0], 1),
            "images_per_second": round(BATCHES[method] / median_step(clock), 1),
            "seed": arguments.seed,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
