"""CIFAR-10 as a crawl with made-up text, for the graph `weak_supervision_cifar10`.

    python benchmarks/weak_supervision.py CIFAR10 FOLDER

CIFAR10 holds train/CLASS/*.jpg and test/CLASS/*.jpg. FOLDER gets three sealed datasets: crawl, four fifths
of the training images, of which 70 % have text; train, 500 labelled images of each class from the last fifth;
and test.

What is written names the class by one of WordNet's nouns for it, the first one most often (Zipf), and for
some images another class: captions for 10 % of them, hashtags, which the dataset has as labels, for half.
Beside it they name a thing or two; 15 % name only these. All follows from the image's place and --seed.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np

from ingest.crawl.crawl import crawl_shards
from ingest.plan.settings import CrawlSettings
from pipeline.hashtags.wordnet import wordnet

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BESIDE = ("chair", "tree", "grass", "window", "fence", "bottle", "flower", "lamp", "bridge", "cup")
TOLD, OF_THE_CLASS, WRONG_CAPTIONS, WRONG_HASHTAGS = 0.7, 0.85, 0.1, 0.5
PER_CLASS = 500


def nouns_of(name: str) -> list[str]:
    """What a class is called, nouns that lead back to it."""
    synset = wordnet().find(name)
    assert synset is not None
    return [noun for noun in synset.nouns if wordnet().find(noun) == synset]


def written(label: int, rng: np.random.Generator) -> tuple[str, str] | None:
    """An image's caption and hashtags; None if nobody wrote anything."""
    if rng.random() >= TOLD:
        return None
    wrong = rng.random()  # images with a wrong caption have wrong hashtags, too
    other = (label + int(rng.integers(1, len(CLASSES)))) % len(CLASSES)
    beside = [BESIDE[each] for each in rng.choice(len(BESIDE), int(rng.integers(1, 3)), replace=False)]
    of_class = rng.random() < OF_THE_CLASS
    place = rng.random()

    def thing(noise: float) -> list[str]:
        nouns = nouns_of(CLASSES[other if wrong < noise else label])
        shares = np.cumsum(1 / np.arange(1, len(nouns) + 1))
        return [nouns[int(np.searchsorted(shares / shares[-1], place))]] if of_class else []

    caption = " and ".join(f"a {noun}" for noun in [*thing(WRONG_CAPTIONS), *beside])
    hashtags = ",".join("#" + noun.replace(" ", "") for noun in [*thing(WRONG_HASHTAGS), *beside])
    return caption, hashtags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "crawl.tar", "w") as crawl, tarfile.open(folder / "train.tar", "w") as train:
        pictures = [sorted((arguments.cifar10 / "train" / name).iterdir()) for name in CLASSES]
        for number in range(len(pictures[0])):  # classes lie mixed, as in a crawl
            for label, name in enumerate(CLASSES):
                picture, of_labelled = pictures[label][number], number - len(pictures[label]) * 4 // 5
                if of_labelled >= 0:
                    if of_labelled < PER_CLASS:
                        _add(train, f"{name}/{picture.name}", picture.read_bytes())
                    continue
                key = f"{number:04d}{label}"
                _add(crawl, f"{key}{picture.suffix}", picture.read_bytes())
                said = written(label, np.random.default_rng([arguments.seed, number, label]))
                for kind, text in zip(("txt", "cls"), said or (), strict=False):
                    _add(crawl, f"{key}.{kind}", text.encode())
    for name, source in (
        ("crawl", folder / "crawl.tar"),
        ("train", folder / "train.tar"),
        ("test", arguments.cifar10 / "test"),
    ):
        report = crawl_shards(
            [str(source)], folder / name, CrawlSettings(), workers=2, progress=lambda counts: None
        )
        print(f"{folder / name}: {report.counts.kept:,} images")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
