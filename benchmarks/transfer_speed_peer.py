"""The peers of benchmarks/transfer_speed.py: timm's training loop, and a plain torchvision loop for features.

It imports nothing of this project and runs under any Python that has torch, torchvision, timm and psutil.
timm's wheel has no train.py: what is here is its `train_one_epoch` and what `main` builds for it, with timm's
own loader, mixup, loss, optimizer and average. torchvision's compiled operators, which neither uses, are left
out: they want the build of torch that they were made with.

Prints one JSON line: images per CPU second of all processes, and per second, start-up excluded.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import psutil
import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Clock:
    """CPU seconds of this process and its workers, those that have ended too, and seconds, since `start`."""

    def now(self) -> tuple[float, float]:
        here = psutil.Process()
        spent = sum(here.cpu_times()[:4]) + sum(
            sum(each.cpu_times()[:4]) for each in here.children(recursive=True)
        )
        return spent, time.perf_counter()

    def start(self) -> None:
        self._cpu, self._wall = self.now()

    def tell(self, images: int) -> None:
        cpu, wall = self.now()
        print(
            json.dumps(
                {"per_cpu_second": images / (cpu - self._cpu), "per_second": images / (wall - self._wall)}
            )
        )


def finetune(options: argparse.Namespace, step: Callable[[int], None]) -> None:
    """timm's loop for ever; `step` is told of each that is done."""
    from timm.data import FastCollateMixup, create_dataset, create_loader
    from timm.loss import SoftTargetCrossEntropy
    from timm.models import create_model
    from timm.optim import create_optimizer_v2
    from timm.utils import AverageMeter, ModelEmaV3

    dataset = create_dataset("", root=options.folder, is_training=True)
    classes = len(dataset.reader.class_to_idx)
    mixing = FastCollateMixup(mixup_alpha=0.1, label_smoothing=0.1, num_classes=classes)
    loader = create_loader(
        dataset,
        input_size=(3, options.size, options.size),
        batch_size=options.batch,
        is_training=True,
        color_jitter=0.0,
        interpolation="bicubic",
        num_workers=options.workers,
        collate_fn=mixing,
        device=torch.device("cpu"),
    )
    model = create_model(options.trunk, num_classes=classes)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, weight_decay=2e-5, momentum=0.9)
    criterion, average, losses = SoftTargetCrossEntropy(), ModelEmaV3(model, decay=0.9998), AverageMeter()
    done = 0
    model.train()
    while True:
        for images, target in loader:
            loss = criterion(model(images), target)
            loss.backward()
            optimizer.step()
            average.update(model, step=done)
            optimizer.zero_grad()
            losses.update(loss.item(), len(images))
            done += 1
            step(done)


def features(options: argparse.Namespace) -> None:
    from torch.utils.data import DataLoader
    from torchvision import datasets, models, transforms

    shown = transforms.Compose(
        [
            transforms.Resize(options.size * 8 // 7),
            transforms.CenterCrop(options.size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    loader = DataLoader(
        datasets.ImageFolder(options.folder, shown), batch_size=options.batch, num_workers=options.workers
    )
    if options.trunk == "none":
        trunk: torch.nn.Module = torch.nn.Sequential(torch.nn.AvgPool2d(28), torch.nn.Flatten())
    else:
        trunk = models.get_model(options.trunk)
        trunk.fc = torch.nn.Identity()
    trunk.eval()
    clock, rows = Clock(), []
    with torch.no_grad():
        for images, _ in loader:
            rows.append(trunk(images))
            if len(rows) == 1:
                clock.start()
    clock.tell(sum(map(len, rows[1:])))


def open_target(target: str) -> None:
    """Let what pip has put there be imported."""
    sys.path.append(target)
    whole = torch.library.register_fake
    torch.library.register_fake = lambda name, *words, **named: (
        (lambda function: function) if name.startswith("torchvision::") else whole(name, *words, **named)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--target", required=True, help="where pip has put the peers: --target")
    for name, value in (("size", 224), ("batch", 32), ("workers", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--trunk", default="resnet18")
    options = parser.parse_args()
    open_target(options.target)
    features(options)


if __name__ == "__main__":
    main()
