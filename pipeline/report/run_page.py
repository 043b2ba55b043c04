"""The page of one run, which needs no labels: one HTML file, of a run that has ended or still goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from markupsafe import Markup
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import UserError
from cluster.json_rows import read_rows
from cluster.typed_yaml import load_recipe
from ingest.dataset.open import Dataset
from pipeline.checkpoint.files import latest
from pipeline.data.clip.evaluation import AudioPreprocessing
from pipeline.data.clip.statistics import read_statistics
from pipeline.data.evaluation import Preprocessing, evaluation_preprocessing, image_batches, normalise
from pipeline.data.training_set import open_training_set
from pipeline.methods.build import assemble_method
from pipeline.methods.method import Method
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.report.clip_gallery import Player, PositiveSets, players, positive_sets
from pipeline.report.feature_map import map_of
from pipeline.report.gallery import CropRow, Query, Samples, crops_seen, near_each_other
from pipeline.report.page import environment
from pipeline.report.prototypes import PrototypeGallery, draw_positions, gallery_of, load_newest
from pipeline.report.training_curves import training_curves
from pipeline.train.branch import read_parent
from pipeline.train.steering import read_changes

_CROP_ROWS, _QUERIES, _NEIGHBOURS, _PROTOTYPES, _CLIPS = 6, 6, 8, 8, 8


@dataclass(kw_only=True)
class _Seen:
    """What there is to look at of a run, and why the rest is not there."""

    samples: int | None = None
    root: str | None = None
    crops: list[CropRow] = field(default_factory=list)
    clips: list[Player] = field(default_factory=list)
    positives: PositiveSets | None = None
    step: int | None = None  # of the checkpoint that was looked at
    drawn: int = 0
    gallery: PrototypeGallery | None = None
    queries: list[Query] = field(default_factory=list)
    map: Markup | None = None
    missing: list[str] = field(default_factory=list)


def run_page(run: Path, known: Mapping[str, Any], *, images: int, seed: int, device: torch.device) -> str:
    """The page of a run of pretraining or fine-tuning.

    What cannot be shown, because the images are elsewhere or nothing is saved yet, is left out, and why is
    said.

    Args:
        known: what is known of its state, as `submit status --json` tells it.
        images: at most so many are drawn by the seed, and shown to the trunk of the newest checkpoint; of 0
            no checkpoint is read.
        device: where the trunk is.

    Raises:
        UserError: if it has no recipe, or its files are damaged.
    """
    path = run / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not a run of pretraining: it has no recipe.yaml")
    recipe = load_recipe(PretrainRecipe, str(path), kind="pretrain")
    seen = _look(run, recipe, images=images, seed=seed, device=device)
    attempts = run / "attempts.jsonl"
    return (
        environment()
        .get_template("run.html")
        .render(
            **({"plays": True} if recipe.data.is_of_clips else {}),
            title=known["run"],
            known=known,
            summary=known["why"].splitlines(),
            restarts=[{**restart, "when": _moment(restart["time"])} for restart in known["restarts"]],
            made=_moment(time.time()),
            pretrain=recipe,
            attempt=next(iter(list(read_rows(attempts))[-1:]), {}) if attempts.is_file() else {},
            parent=read_parent(run),
            changes=read_changes(run),
            curves=training_curves({"": run}),
            seen=seen,
            crops=seen.crops,
            gallery=seen.gallery,
            queries=seen.queries,
            map=seen.map,
            recipe_text=yaml.safe_dump(
                recipe.model_dump(mode="json", exclude={"run"}), sort_keys=False, width=80
            ),
        )
    )


def _look(run: Path, recipe: PretrainRecipe, *, images: int, seed: int, device: torch.device) -> _Seen:
    seen = _Seen()
    try:
        dataset = open_training_set(recipe.data).dataset
        seen.samples, seen.root = len(dataset), dataset.root
        if recipe.data.is_of_clips:
            _look_at_clips(seen, run, recipe, dataset, seed=seed)
            return seen
        samples = Samples(dataset)
        try:
            seen.crops = crops_seen(recipe, samples, {}, count=_CROP_ROWS)
            if images and latest(run) is None:
                seen.missing.append("Nothing is saved yet: neighbours are there once a checkpoint is.")
            elif images:
                _look_through_trunk(seen, run, recipe, samples, images=images, seed=seed, device=device)
        finally:
            samples.close()
    except UserError as error:
        seen.missing.append(f"Not all can be shown: {error}.")
    return seen


def _look_at_clips(seen: _Seen, run: Path, recipe: PretrainRecipe, dataset: Dataset, *, seed: int) -> None:
    if recipe.data.audio is None:
        seen.missing.append("Clips without sound are not shown.")
        return
    sound = AudioPreprocessing.of(recipe.data.audio, read_statistics(run))
    drawn = draw_positions(dataset, _CLIPS, seed=seed)
    shown = players(dataset, drawn.tolist(), sound, {})
    seen.clips = [shown[position] for position in drawn.tolist()]
    seen.positives = positive_sets(run, dataset, sound, sets=4, shown=5, seed=seed)


def _look_through_trunk(
    seen: _Seen,
    run: Path,
    recipe: PretrainRecipe,
    samples: Samples,
    *,
    images: int,
    seed: int,
    device: torch.device,
) -> None:
    with torch.device("meta"):
        method = assemble_method(recipe, total_steps=1, group=None)
    seen.step = load_newest(method, run)
    method.to(device)
    dataset = open_training_set(recipe.data).dataset
    drawn = draw_positions(dataset, images, seed=seed)
    seen.drawn = len(drawn)
    keys, x = _features(method, dataset, drawn, evaluation_preprocessing(recipe), device)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    keys, x = keys[order], x[order]
    seen.queries = near_each_other(keys, x, samples, queries=_QUERIES, neighbours=_NEIGHBOURS)
    seen.map = map_of(keys, x, samples, {}, seed=seed)
    seen.gallery = gallery_of(
        method,
        recipe,
        dataset,
        drawn,
        samples=samples,
        labels={},
        rows=_PROTOTYPES,
        images=_NEIGHBOURS,
        device=device,
    )


def _features(
    method: Method,
    dataset: Dataset,
    positions: NDArray[np.int64],
    preprocessing: Preprocessing,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Sample keys (n,) and features (n, d) of the trunk that learns, on the CPU."""
    keys, parts = list[Tensor](), list[Tensor]()
    with torch.inference_mode():
        for batch in image_batches(dataset, positions, preprocessing=preprocessing, workers=0):
            parts.append(method.trunk(normalise(batch.images, preprocessing, device)).float().cpu())
            keys.append(batch.keys)
    x = torch.cat(parts)
    if not bool(x.isfinite().all()):
        raise UserError("the trunk's features are not finite: its weights are broken")
    return torch.cat(keys), x


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # damaged, and no reason to show nothing else
        return "at no time"
