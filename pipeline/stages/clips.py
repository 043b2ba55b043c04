"""Small clips with sound and labels, for trying everything out: drawn, or pictures with their spoken names.

Whatever they are made of, a training clip and a test clip share nothing but how they are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.atomic_file import write_atomically
from cluster.map.processes import processes
from pipeline.data.clip.encode import encode_clip
from pipeline.recipe.stages import ClipsRecipe
from pipeline.stages.clip import FPS, RATE, Clip
from pipeline.stages.synthetic_clips import synthesise
from pipeline.stages.tuxpaint_clips import Pair, name_aloud, read_pairs, stamps_identity

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A clip to make: its label, where it goes, the seed of its draws, and the pair that it shows, if any."""

    label: str
    path: Path
    seed: tuple[int, ...]
    pair: Pair | None = None


def make_clips(recipe: ClipsRecipe, folder: Path) -> dict[str, Any]:
    """Write `train/LABEL/000123.mp4`, `test/LABEL/…` and `clips.json`, what they are, into a folder.

    Returns:
        Counts, and a digest of everything that was drawn, for the receipt.

    Raises:
        UserError: if what clips are made of is not there.
    """
    labels, wanted = _tuxpaint(recipe, folder) if recipe.source == "tuxpaint" else _synthetic(recipe, folder)
    for parent in sorted({each.path.parent for each in wanted}):
        parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with processes(max(1, recipe.run.workers)) as map_tasks:
        for one in map_tasks(partial(_make, recipe), wanted):
            digest.update(one.encode())
    metrics = {
        "labels": len(labels),
        "train_clips": recipe.train_clips,
        "test_clips": recipe.test_clips,
        "drawn": digest.hexdigest(),
    }
    description = {"source": recipe.source, "names": labels, **metrics}
    write_atomically(folder / "clips.json", json.dumps(description, indent=2) + "\n")
    return metrics


def identity(recipe: ClipsRecipe) -> str:
    """What the clips depend on besides the recipe."""
    return stamps_identity(Path(recipe.stamps)) if recipe.source == "tuxpaint" else ""


def _synthetic(recipe: ClipsRecipe, folder: Path) -> tuple[list[str], list[_Wanted]]:
    labels = [f"{shape}_{motion}" for shape in recipe.shapes for motion in recipe.motions]
    return labels, _each(recipe, folder, lambda split, number: (labels[number % len(labels)], None))


def _tuxpaint(recipe: ClipsRecipe, folder: Path) -> tuple[list[str], list[_Wanted]]:
    """Of all kinds equally many as long as there are, and every pair once before any twice."""
    pairs = read_pairs(Path(recipe.stamps), np.random.default_rng([recipe.seed, 2]))

    def next_one(split: Split, number: int) -> tuple[str, Pair]:
        of_split = pairs[split]
        pair = of_split[number % len(of_split)]
        return pair.kind, pair

    return sorted({pair.kind for pair in pairs["train"]}), _each(recipe, folder, next_one)


def _each(
    recipe: ClipsRecipe, folder: Path, what: Callable[[Split, int], tuple[str, Pair | None]]
) -> list[_Wanted]:
    counts: Sequence[tuple[Split, int]] = (("train", recipe.train_clips), ("test", recipe.test_clips))
    wanted = []
    for split, count in counts:
        for number in range(count):
            label, pair = what(split, number)
            path = folder / split / label / f"{number:06d}.mp4"
            seed = (recipe.seed, int(split == "test"), number)
            wanted.append(_Wanted(label=label, path=path, seed=seed, pair=pair))
    return wanted


def _make(recipe: ClipsRecipe, wanted: _Wanted) -> str:
    clip = _draw(recipe, wanted)
    wanted.path.write_bytes(encode_clip(clip.frames, clip.sound, fps=FPS, rate=RATE))
    return clip.digest


def _draw(recipe: ClipsRecipe, wanted: _Wanted) -> Clip:
    rng = np.random.default_rng(wanted.seed)
    if wanted.pair is not None:
        return name_aloud(wanted.pair, rng, side=recipe.side, seconds=recipe.seconds)
    shape, motion = wanted.label.split("_")
    return synthesise(shape, motion, rng, side=recipe.side, seconds=recipe.seconds)  # type: ignore[arg-type]
