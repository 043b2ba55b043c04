"""Claim: with 1 % and 10 % of CIFAR-10's labels, fine-tuning starts better from SwAV than from scratch.

    python benchmarks/fewer_labels.py CIFAR10 FOLDER [--steps 1500] [--seeds 0 1 2]

CIFAR10 holds train/CLASS/*.jpg and test/CLASS/*.jpg. SwAV sees all training images and no label. Both arms
have the same tuning: of each rate in RATES one trial, on the labels of the first seed, is scored on 500
training images of each class that are never among the labels. The best rate of either arm then learns from
other labels with each seed, and the test images are looked at once. Prints a table in Markdown: accuracies
with their 95 % intervals and, on the same labels, the difference with its interval. Ends with 1 if SwAV is
not ahead in each. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pipeline.transfer.compare import compare_predictions
from pipeline.transfer.predict import read_predictions

ARMS = ("swav", "scratch")
SHARES = {"1 %": 50, "10 %": 500}  # labels of each class
STEPS = {"1 %": 500, "10 %": 1200}
RATES = (0.005, 0.02, 0.08)  # of the trunk; the head has ten times as much
HELD_OUT = 500  # of each class
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500, help="of SwAV, 256 images each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    held, pool = divide(arguments.images / "train")
    (folder / "held.txt").write_text("\n".join(held) + "\n")
    (folder / "pool.txt").write_text("\n".join(pool) + "\n")
    for part in ("train", "test"):
        source, output = str(arguments.images / part), str(folder / part)
        subprocess.run(
            [str(Path(sys.executable).parent / "ingest"), "crawl-shards", source, "--output", output],
            check=True,
        )
    trials = {
        f"{arm}, {share}, {rate}": tuned(arm, share, rate, seed=arguments.seeds[0], test="held")
        for arm in ARMS
        for share in SHARES
        for rate in RATES
    }
    found = run_graph(folder, "tuning", trials, arguments)
    best = {
        (arm, share): max(RATES, key=lambda rate: found[f"{arm}, {share}, {rate}"]["top1"])
        for arm in ARMS
        for share in SHARES
    }
    for (arm, share), rate in best.items():
        scores = ", ".join(
            f"{100 * found[f'{arm}, {share}, {each}']['top1']:.1f} at {each}" for each in RATES
        )
        print(f"{share}, {arm}: on images held out {scores}: {rate}", flush=True)
    last = {
        f"{arm}, {share}, {seed}": tuned(arm, share, best[arm, share], seed=seed, test="test")
        for arm in ARMS
        for share in SHARES
        for seed in arguments.seeds
    }
    run_graph(folder, "fewer_labels", last, arguments)
    sys.exit(not table(folder / "latest", arguments.seeds))


def divide(train: Path) -> tuple[list[str], list[str]]:
    """URLs of the images that are held out, the last ones of each class, and of all others."""
    held, pool = [], []
    for label in sorted(path for path in train.iterdir() if path.is_dir()):
        names = [f"train/{label.name}/{path.name}" for path in sorted(label.iterdir())]
        pool += names[:-HELD_OUT]
        held += names[-HELD_OUT:]
    return held, pool


def tuned(arm: str, share: str, rate: float, *, seed: int, test: str) -> dict[str, Any]:
    """A stage that fine-tunes."""
    recipe = {
        "base": "transfer/finetune_cifar10",
        "seed": seed,
        "data": {"batch_size": BATCH},
        "optim": {"lr": rate, "lr_head": 10 * rate},
        "train": {"epochs": None, "steps": STEPS[share]},
        "run": {"device": "cpu", "workers": 1, "log_every": 100},
    }
    inputs = {"trunk": "trunk" if arm == "swav" else f"scratch_{seed}", "test": f"{test}/data"}
    return {"kind": "finetune", "recipe": recipe, "inputs": inputs | {"data": f"{labels(share, seed)}/data"}}


def labels(share: str, seed: int) -> str:
    return f"labels_{SHARES[share]}_{seed}"


def run_graph(
    folder: Path, name: str, leaves: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run the stages and all that they stand on.

    Returns:
        The metrics of each.
    """
    stages: dict[str, Any] = {
        "train": {"kind": "dataset", "recipe": {"path": str(folder / "train")}},
        "test": {"kind": "dataset", "recipe": {"path": str(folder / "test")}},
        "held": {
            "kind": "subset",
            "recipe": {"keep": str(folder / "held.txt")},
            "inputs": {"data": "train/data"},
        },
        "swav": {
            "kind": "pretrain",
            "recipe": {
                "base": "pretrain/cifar10",
                "train": {"steps": arguments.steps},
                "run": {"device": "cpu"},
            },
            "inputs": {"data": "train/data"},
        },
        "trunk": {"kind": "export", "inputs": {"run": "swav"}},
    }
    for seed in arguments.seeds:
        stages[f"scratch_{seed}"] = {
            "kind": "random_trunk",
            "recipe": {"seed": seed, "run": {"workers": 1}},
            "inputs": {"like": "trunk", "data": "train/data"},
        }
        for share, count in SHARES.items():
            stages[labels(share, seed)] = {
                "kind": "subset",
                "recipe": {"keep": str(folder / "pool.txt"), "per_label": count, "seed": seed},
                "inputs": {"data": "train/data"},
            }
    stages |= {stage_name(title): stage for title, stage in leaves.items()}
    graph = folder / f"{name}.yaml"
    graph.write_text(yaml.safe_dump({"folder": str(folder), "stages": stages}, sort_keys=False))
    subprocess.run([sys.executable, "-m", "pipeline.cli", "dag", str(graph)], check=True, stdout=sys.stderr)
    return {title: receipt(folder / "latest" / stage_name(title)) for title in leaves}


def stage_name(title: str) -> str:
    words = title.replace(" %", "").replace(".", "_").split(", ")
    return "_".join(words)


def receipt(stage: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage / "receipt.json").read_text())["metrics"]
    return found


def table(latest: Path, seeds: list[int]) -> bool:
    """Print what was found.

    Returns:
        Whether SwAV is ahead in each pair, by the interval of the difference.
    """
    ahead = []
    print(
        "| labels | seed | from scratch | from SwAV | difference, points | ahead |\n|---|---|---|---|---|---|"
    )
    for share in SHARES:
        for seed in seeds:
            folders = {arm: latest / stage_name(f"{arm}, {share}, {seed}") for arm in ARMS}
            pair = compare_predictions(
                {arm: read_predictions(folders[arm] / "predictions.parquet") for arm in ("scratch", "swav")}
            ).pairs[0]
            ahead.append(pair.paired.decided and pair.paired.difference > 0)
            cells = " | ".join(shown(receipt(folders[arm])) for arm in ("scratch", "swav"))
            paired, yes = pair.paired, "yes" if ahead[-1] else "no"
            low, high = 100 * paired.interval.low, 100 * paired.interval.high
            difference = f"{100 * paired.difference:+.1f} ({low:+.1f} to {high:+.1f})"
            print(f"| {share} | {seed} | {cells} | {difference} | {yes} |")
    return all(ahead)


def shown(found: dict[str, Any]) -> str:
    """An accuracy with its interval, in percent."""
    return f"{100 * found['top1']:.1f} ({100 * found['top1_low']:.1f} to {100 * found['top1_high']:.1f})"


if __name__ == "__main__":
    main()
