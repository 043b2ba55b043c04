"""Claim: SwAV on 2 CPU cores learns CIFAR-10 features beyond raw pixels within half an hour.

    python benchmarks/cifar10.py FOLDER [--out out/cifar10] [--steps 2300] [--seed 0] [key=value ...]

FOLDER holds train/<class>/*.jpg and test/<class>/*.jpg; the labels are not used in pretraining. Ingests both,
runs `submit pretrain --recipe cifar10` with a checkpoint every 5 minutes, and scores every checkpoint by kNN
(k = 200, T = 0.1, 50,000 training images, 10,000 test images) against wall time, beside raw pixels and
the random-initialised trunk with calibrated BatchNorm. Writes curve-SEED.json and curve-SEED.svg into --out.
Wall time is the run's own, from its start to the checkpoint: training's start-up and checkpoints included,
evaluation (afterwards) not.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from ingest.dataset import Dataset, open_dataset
from pipeline.export import export_trunk, pixels_trunk, random_trunk, read_spec
from pipeline.recipe import KnnRecipe
from pipeline.train.checkpoint_files import newest_first, step_of
from pipeline.transfer.features import extract_from_files
from pipeline.transfer.knn import knn

RECIPE = KnnRecipe(k=(200,), temperature=0.1)
CPU = torch.device("cpu")
WORKERS = 2
LIGHTLY = 37.31  # the peer: lightly 1.6, RegNetY-200MF, the same protocol, 15 minutes of 2 cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/cifar10"))
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    out: Path = arguments.out
    for part in ("train", "test"):
        command("ingest", "crawl-shards", str(arguments.folder / part), "--output", str(out / part))
    run = out / f"run-{arguments.seed}"
    command(
        "submit", "pretrain", "--recipe", "cifar10", "--run", run.name, f"run.folder={out}",
        f"data.root={out / 'train'}", f"seed={arguments.seed}", f"train.steps={arguments.steps}",
        "run.checkpoint_minutes=5", "run.keep_last=100", *arguments.overrides,
    )  # fmt: skip
    train, test = open_dataset(out / "train"), open_dataset(out / "test")
    points = []
    for checkpoint in sorted(newest_first(run), key=step_of):
        trunk = out / f"trunk-{arguments.seed}-{step_of(checkpoint)}"
        export_trunk(checkpoint, trunk)
        minutes = minutes_until(checkpoint, run)
        points.append({"step": step_of(checkpoint), "minutes": minutes, "top1": score(trunk, train, test)})
        print(f"step {points[-1]['step']:6d}  {minutes:5.1f} min  kNN {points[-1]['top1']:.2f} %", flush=True)
    spec = read_spec(trunk)
    random_trunk(spec, train, seed=arguments.seed, out=out / "random", workers=WORKERS, device=CPU)
    pixels_trunk(spec, size=32, out=out / "pixels")
    baselines = {name: score(out / name, train, test) for name in ("random", "pixels")}
    for name, top1 in baselines.items():
        print(f"{name:>11}             kNN {top1:.2f} %")
    (out / f"curve-{arguments.seed}.json").write_text(json.dumps({"points": points, **baselines}, indent=2))
    draw(points, baselines, out / f"curve-{arguments.seed}.svg")


def command(*words: str) -> None:
    """One of the product's commands, as a user types it."""
    subprocess.run([str(Path(sys.executable).parent / words[0]), *words[1:]], check=True)


def minutes_until(checkpoint: Path, run: Path) -> float:
    """Wall time from the run's start to this checkpoint's publication."""
    first = (run / "recipe.yaml").stat().st_mtime
    return ((checkpoint / "manifest.json").stat().st_mtime - first) / 60


def score(trunk: Path, train: Dataset, test: Dataset) -> float:
    """kNN top-1 in percent."""
    bank, queries = extract_from_files(trunk, train, test, workers=WORKERS, device=CPU)
    return 100 * knn(bank, queries, RECIPE).top1[200]


def draw(points: list[dict[str, float]], baselines: dict[str, float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(
        [p["minutes"] for p in points], [p["top1"] for p in points], marker="o", label="SwAV, this pipeline"
    )
    axes.axhline(baselines["pixels"], color="tab:brown", linestyle="--", label="raw pixels")
    axes.axhline(baselines["random"], color="tab:gray", linestyle=":", label="random trunk, calibrated")
    axes.plot([15], [LIGHTLY], marker="s", linestyle="", color="tab:red", label="SwAV, lightly, 15 min")
    axes.set(xlabel="minutes on 2 CPU cores", ylabel="kNN top-1, %", xlim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
