"""The report on a training on videos: one HTML page that needs nothing else, with clips that play."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from cluster.atomic_file import write_atomically
from cluster.typed_yaml import load_recipe
from ingest.dataset.open import Dataset, open_dataset
from pipeline.dag.stage import Input
from pipeline.data.clip.evaluation import AudioPreprocessing
from pipeline.data.clip.statistics import read_statistics
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.stages import ClipsReportRecipe
from pipeline.report.clip_gallery import PositiveSets, across, labels_of, near_rows, players, positive_sets
from pipeline.report.clip_scores import TRUNKS, ScoreRow, score_rows
from pipeline.report.figures import Bar, bar_chart
from pipeline.report.page import environment
from pipeline.report.run_report import hardware, stages_of
from pipeline.report.training_curves import training_curves
from pipeline.transfer.features import Features, load_features

_TONES = {"": "t1", "_cma": "t5", "_random": "t2"}


def build_clips_report(inputs: Mapping[str, Input], recipe: ClipsReportRecipe, out: Path) -> None:
    """Write the page.

    Args:
        inputs: `data`, the videos of the training, `test`, labelled ones, `run`, AVID's, and `embeddings` of
            `test`; `cma`, a run of CMA, `cross_modal`, and any of the roles in `CLIP_SCORES`.
    """
    run = inputs["run"].path
    pretrain = load_recipe(PretrainRecipe, str(run / "recipe.yaml"), kind="pretrain")
    assert pretrain.data.audio is not None
    sound = AudioPreprocessing.of(pretrain.data.audio, read_statistics(run))
    video, audio = (
        load_features(inputs["embeddings"].path / f"{name}.safetensors") for name in ("video", "audio")
    )
    test, rows = _opened(inputs["test"]), score_rows(inputs)
    order = _of_different_labels(video, recipe.seed)
    chosen = order[: recipe.queries]
    seen, heard = (
        across(video, audio, chosen, recipe.neighbours),
        across(audio, video, chosen, recipe.neighbours),
    )
    wanted = [*order[: recipe.clips], *chosen, *(other for _, near in seen + heard for other, _ in near)]
    played = players(test, wanted, sound, labels_of(test, np.arange(len(test))))
    runs = {"AVID": run} | ({"AVID, then CMA": inputs["cma"].path} if "cma" in inputs else {})
    page = (
        environment()
        .get_template("clips.html")
        .render(
            plays=True,
            title=recipe.title,
            rows=rows,
            trunks={key: name for key, name in TRUNKS.items() if any(key in row.metrics for row in rows)},
            chart=_chart(rows),
            chance=1 / len(video.classes),
            retrieval=inputs["cross_modal"].receipt.metrics if "cross_modal" in inputs else None,
            clips=[played[row] for row in order[: recipe.clips]],
            seen=near_rows(seen, played),
            heard=near_rows(heard, played),
            positives=_positive_sets(inputs, sound, recipe) if "cma" in inputs else None,
            data={name: inputs[name].receipt.metrics for name in ("data", "test")},
            pretrain=pretrain,
            curves=training_curves(runs, tones=("t1", "t5")[: len(runs)]),
            hardware=hardware(run),
            machine=inputs["run"].receipt.machine,
            stages=stages_of(inputs),
            recipe_text=yaml.safe_dump(
                pretrain.model_dump(mode="json", exclude={"run"}), sort_keys=False, width=80
            ),
        )
    )
    write_atomically(out, page)


def _positive_sets(
    inputs: Mapping[str, Input], sound: AudioPreprocessing, recipe: ClipsReportRecipe
) -> PositiveSets | None:
    """Rows of a bank are those of the run's own view of the data, wherever these lie now."""
    run = inputs["cma"].path
    data = load_recipe(PretrainRecipe, str(run / "recipe.yaml"), kind="pretrain").data
    dataset = open_dataset(inputs["data"].path, sealed=data.sealed, view=data.view)
    return positive_sets(
        run, dataset, sound, sets=recipe.positive_sets, shown=recipe.positives, seed=recipe.seed
    )


def _opened(source: Input) -> Dataset:
    metrics = source.receipt.metrics
    return open_dataset(source.path, sealed=metrics.get("root"), view=metrics.get("view"))


def _of_different_labels(features: Features, seed: int) -> list[int]:
    """All rows in an order drawn by the seed, the first of each label first."""
    order = np.random.default_rng(seed).permutation(len(features.y))
    _, first = np.unique(features.y.numpy()[order], return_index=True)
    rest = np.setdiff1d(np.arange(len(order)), first)
    return [int(row) for row in order[np.concatenate([np.sort(first), rest])]]


def _chart(rows: list[ScoreRow]) -> str:
    groups = [
        (
            row.title,
            [
                Bar(
                    name=TRUNKS[trunk],
                    value=metrics["top1"],
                    low=metrics["top1_low"],
                    high=metrics["top1_high"],
                    tone=_TONES[trunk],
                )
                for trunk, metrics in row.metrics.items()
            ],
        )
        for row in rows
    ]
    return bar_chart(groups, title="Accuracy on the test videos")
