"""Claim: in a quarter of an hour of 2 CPU cores each method learns CIFAR-10 beyond a random trunk.

    python benchmarks/cifar10.py FOLDER [--out out/cifar10] [--minutes 15] [--seed 0] [--peer peer.jsonl]
        [--methods swav barlow_twins] [--change data.crops.0.interpolation=bicubic] [--label bicubic]

FOLDER holds train/<class>/*.jpg and test/<class>/*.jpg; the labels are not used in pretraining. Ingests both,
then runs `submit pretrain` with the recipes of the graph `cifar10_cpu`, one method after another, with a
checkpoint every 5 minutes. A trial of 60 steps, outside the minutes, says how many steps fit into them: each
method ends its whole cosine schedule. Every checkpoint is scored by kNN (k = 200, T = 0.1, 50,000 training
images, 10,000 test images) against wall time, beside raw pixels and the random-initialised trunk with
calibrated BatchNorm. Wall time starts when training has been set up, about 2 s after the command; saving
counts, evaluation (afterwards) does not. Writes curves-MINUTES-SEED.json and .svg into --out; --peer adds to
the figure what benchmarks/cifar10_peer.py has printed; --change overrides keys of all recipes, and --label
keeps such runs apart. The same command goes on where it was stopped, but the pause counts as wall time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import yaml

from cluster.typed_yaml import apply_override
from ingest.dataset.open import Dataset, open_dataset
from pipeline.checkpoint.files import newest_first, step_of
from pipeline.dag.recipe import load_dag
from pipeline.recipe.transfer import KnnRecipe
from pipeline.report.published import METHODS
from pipeline.transfer.extract import extract_from_files
from pipeline.transfer.knn import knn
from pipeline.trunks.baselines import pixels_trunk, random_trunk
from pipeline.trunks.export import export_trunk
from pipeline.trunks.files import read_spec

KNN = KnnRecipe(k=(200,), temperature=0.1)
CPU = torch.device("cpu")
WORKERS = 2
TRIAL_STEPS = 60
STEPPING = 0.97  # of the minutes: the first steps, checkpoints and noise take the rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/cifar10"))
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--change", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--label", help="of runs with a --change")
    arguments = parser.parse_args()
    out: Path = arguments.out
    lines = arguments.peer.read_text().splitlines() if arguments.peer else ()
    peer = {row["method"]: row for row in map(json.loads, lines)}
    for part in ("train", "test"):
        command("ingest", "crawl-shards", str(arguments.folder / part), "--output", str(out / part))
    train, test = open_dataset(out / "train"), open_dataset(out / "test")
    curves: dict[str, list[dict[str, float]]] = {}
    attempt = "-".join(filter(None, (f"{arguments.minutes:g}-{arguments.seed}", arguments.label)))
    recipes = {
        method: changed_recipe(method, out, seed=arguments.seed, changes=arguments.change)
        for method in arguments.methods
    }
    for method, recipe in recipes.items():
        trial = pretrain(recipe, out, name=f"trial-{method}-{attempt}", steps=TRIAL_STEPS)
        steps = round(60 * STEPPING * arguments.minutes * steps_per_second(trial))
        run = pretrain(recipe, out, name=f"{method}-{attempt}", steps=steps)
        curves[method] = []
        for checkpoint in reversed(newest_first(run / "checkpoints")):
            trunk = out / f"trunk-{run.name}-{step_of(checkpoint)}"
            export_trunk(checkpoint, trunk)
            point = {
                "step": step_of(checkpoint),
                "minutes": minutes_until(checkpoint, run),
                "top1": score(trunk, train, test),
            }
            print(
                METHODS[method],
                "{step:6.0f} steps  {minutes:5.1f} min  kNN {top1:.2f} %".format(**point),
                flush=True,
            )
            curves[method].append(point)
    spec = read_spec(trunk)  # of any: all four have the same
    random_trunk(spec, train, seed=arguments.seed, out=out / "random", workers=WORKERS, device=CPU)
    pixels_trunk(spec, size=32, out=out / "pixels")
    baselines = {name: score(out / name, train, test) for name in ("random", "pixels")}
    for name, top1 in baselines.items():
        print(f"{name}: kNN {top1:.2f} %")
    (out / f"curves-{attempt}.json").write_text(json.dumps({**curves, **baselines}, indent=2))
    draw(curves, baselines, peer, out / f"curves-{attempt}.svg")


def command(*words: str) -> None:
    """One of the product's commands, as a user types it."""
    subprocess.run([str(Path(sys.executable).parent / words[0]), *words[1:]], check=True)


def changed_recipe(method: str, out: Path, *, seed: int, changes: list[str]) -> dict[str, Any]:
    """The graph's recipe for this method, on the images in `out`, with some keys overridden."""
    recipe: dict[str, Any] = load_dag("cifar10_cpu", []).stages[f"pretrain_{method}"].recipe
    recipe["seed"] = seed
    recipe["data"]["root"] = str(out / "train")
    recipe["run"] |= {"folder": str(out), "checkpoint_minutes": 5, "keep_last": 100}
    for change in changes:
        apply_override(recipe, change)
    return recipe


def pretrain(recipe: dict[str, Any], out: Path, *, name: str, steps: int) -> Path:
    """The folder of a run of this recipe, of so many steps."""
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"train": {**recipe["train"], "epochs": None, "steps": steps}}))
    where = ("--executor", "local", "--ranks", "1", "--wait")
    command("submit", "pretrain", "--recipe", str(path), "--run", name, *where)
    return out / name


def steps_per_second(run: Path) -> float:
    """The median over a run's rows of timing, without the first one's start-up."""
    rows = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    return 1 / statistics.median([row["seconds"] for row in rows if "seconds" in row][1:])


def minutes_until(checkpoint: Path, run: Path) -> float:
    """Wall time from the start of training to this checkpoint's publication."""
    started = json.loads((run / "attempts.jsonl").read_text().splitlines()[0])["time"]
    return ((checkpoint / "manifest.json").stat().st_mtime - float(started)) / 60


def score(trunk: Path, train: Dataset, test: Dataset) -> float:
    """kNN top-1 in percent."""
    with tempfile.TemporaryDirectory() as folder:
        bank, queries = extract_from_files(trunk, train, test, Path(folder), workers=WORKERS, device=CPU)
        return 100 * knn(bank, queries, KNN).top1[200]


def draw(
    curves: dict[str, list[dict[str, float]]],
    baselines: dict[str, float],
    peer: dict[str, dict[str, Any]],
    path: Path,
) -> None:
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for method, points in curves.items():
        (line,) = axes.plot(
            [p["minutes"] for p in points], [p["top1"] for p in points], marker="o", label=METHODS[method]
        )
        if method in peer:
            axes.plot(
                [peer[method]["seconds"] / 60], [peer[method]["knn"]], marker="s", linestyle="",
                color=line.get_color(), label=f"{METHODS[method]}, lightly",
            )  # fmt: skip
    axes.axhline(baselines["pixels"], color="tab:brown", linestyle="--", label="raw pixels")
    axes.axhline(baselines["random"], color="tab:gray", linestyle=":", label="random trunk, calibrated")
    axes.set(xlabel="minutes on 2 CPU cores", ylabel="kNN top-1, %", xlim=(0, None), ylim=(20, None))
    figure.legend(loc="outside right upper", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
