"""Claim: independent stages side by side end sooner than one after the other, on the same cores.

    python benchmarks/side_by_side.py FOLDER IMAGES [--rounds 3] [--jobs 2] [--steps 30]

IMAGES has a folder for each class. A graph of one dataset and four small trainings on it, which differ in
their seed, is run by `submit dag` with `--jobs 1`, where each has all cores, and with `--jobs N`, where each
has its share, in turns. Prints seconds and CPU seconds of all processes of each round, and their ratios'
medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

RECIPE: dict[str, Any] = {
    "seed": "{seed}",
    "data": {"root": "", "batch_size": 32, "crops": [{"count": 1, "size": 64, "scale": [0.25, 1.0]}]},
    "trunk": {"name": "regnety_tiny"},
    "method": {"name": "classification"},
    "optim": {"name": "sgd", "lr": 0.02},
    "run": {"workers": 0, "device": "cpu", "log_every": 10, "checkpoint_minutes": 60},
}


def run(graph: Path, folder: Path, jobs: int) -> dict[str, float]:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = ["dag", str(graph), f"folder={folder}", "--jobs", str(jobs)]
    subprocess.run([sys.executable, "-m", "pipeline.cli", *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(cpu, 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    graph = options.folder / "graph.yaml"
    graph.parent.mkdir(parents=True, exist_ok=True)
    recipe = RECIPE | {"train": {"steps": options.steps}}
    stages = {
        "data": {"kind": "shards", "recipe": {"source": str(options.images.absolute())}},
        "train_{seed}": {"kind": "pretrain", "recipe": recipe, "inputs": {"data": "data"}},
    }
    repeat = {"seed": ["0", "1", "2", "3"]}
    graph.write_text(yaml.safe_dump({"folder": "", "repeat": repeat, "stages": stages}, sort_keys=False))
    ratios: dict[str, list[float]] = {"seconds": [], "cpu_seconds": []}
    for number in range(options.rounds):
        one = run(graph, options.folder / f"one-{number}", 1)
        several = run(graph, options.folder / f"several-{number}", options.jobs)
        print(json.dumps({"one": one, "several": several}), flush=True)
        for name, found in ratios.items():
            found.append(one[name] / several[name])
    for name, found in ratios.items():
        print(f"{name}, one / several: {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
