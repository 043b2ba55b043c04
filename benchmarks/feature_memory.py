"""Memory of evaluations of features that do not fit into it: `python benchmarks/feature_memory.py FOLDER`

For each size a process of its own writes features of noise, or scores them, and says how much anonymous
memory (RssAnon) it had at most. What is mapped is no part of that: the kernel takes it back when it needs it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path

import torch

from pipeline.recipe.transfer import KnnRecipe, LinearRecipe, LinearSgdRecipe
from pipeline.transfer.features import FeatureWriter, load_features
from pipeline.transfer.knn import knn
from pipeline.transfer.linear import linear_probe
from pipeline.transfer.linear_sgd import linear_sgd

TESTS = 1_000


class PeakAnonymous:
    """Samples this process's anonymous memory as long as the context lasts; `peak` is in bytes."""

    def __enter__(self) -> PeakAnonymous:
        self.peak, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._end.wait(0.01):
            lines = Path("/proc/self/status").read_text().splitlines()
            kib = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak = max(self.peak, kib << 10)


def write(path: Path, rows: int, width: int, classes: int) -> None:
    """Noise around a centre for each class, in bf16, 1,000 rows at a time."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator) / 4
    y = torch.arange(rows) % classes
    names = [f"{label:04d}" for label in range(classes)]
    keys = torch.arange(rows)  # of as many samples: rows of one key are windows of one
    with FeatureWriter(path, y=y, keys=keys, classes=names, dim=width, precision="bf16") as file:
        for start in range(0, rows, 1_000):
            part = y[start : start + 1_000]
            file.write(start, centres[part] + torch.randn(len(part), width, generator=generator))


def one(what: str, folder: Path, *, rows: int, width: int, classes: int, iterations: int) -> None:
    train, test = folder / f"train-{rows}-{width}", folder / f"test-{rows}-{width}"
    with PeakAnonymous() as memory:
        if what == "write":
            write(train, rows, width, classes)
            write(test, TESTS, width, classes)
        elif what == "knn":
            knn(load_features(train), load_features(test), KnnRecipe())
        elif what == "linear_sgd":
            linear_sgd(
                load_features(train), load_features(test), LinearSgdRecipe(rates=(0.01, 0.1), epochs=1)
            )
        else:
            recipe = LinearRecipe(regularisation=(1e-2,), max_iterations=iterations)
            linear_probe(load_features(train), load_features(test), recipe)
    print(json.dumps({"what": what, "rows": rows, "width": width, "GiB": round(memory.peak / 2**30, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 200_000])
    parser.add_argument("--width", type=int, default=2_048)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=["write", "knn", "linear", "linear_sgd"])
    parser.add_argument("--here", help="measure one thing in this process")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.here:
        one(
            options.here,
            options.folder,
            rows=options.rows[0],
            width=options.width,
            classes=options.classes,
            iterations=options.iterations,
        )
        return
    for rows in options.rows:
        for what in options.only:
            words = [sys.executable, __file__, str(options.folder), "--here", what, "--rows", str(rows)]
            for name in ("width", "classes", "iterations"):
                words += [f"--{name}", str(getattr(options, name))]
            subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
