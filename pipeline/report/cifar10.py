"""What four methods reach on CIFAR-10 here, in one table beside what others have published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from pipeline.dag.stage import Input
from pipeline.models.trunk import build_trunk
from pipeline.recipe.data import CropGroup, Data
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.trunk import Stem
from pipeline.report import published
from pipeline.report.page import duration, environment
from pipeline.report.published import (
    METHODS,
    PROBES,
    PUBLISHED,
    Augmentation,
    Evaluation,
    Published,
    knn_classifier,
)
from pipeline.train.length import epochs_in

_STEMS: dict[Stem, str] = {
    "imagenet": "ImageNet's stem",
    "low_resolution": "3x3 stem",
    "low_resolution_padded": "3x3 stem, padded",
}
COLUMNS = ("Method", "Where", "Trunk", "Epochs", "Steps", "Batch", *PROBES.values(), "Comparable")


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """One method's run here on `images` images, and the metrics of each probe of PROBES."""

    recipe: PretrainRecipe
    images: int
    steps: int
    seconds: float
    machine: str
    scores: dict[str, dict[str, Any]]
    temperature: float

    @property
    def epochs(self) -> float:
        """How often every image came up, but for those that fill no batch of an epoch."""
        return epochs_in(self.recipe, samples=self.images, steps=self.steps)

    @property
    def evaluations(self) -> set[Evaluation]:
        """How its accuracies were measured."""
        nearest = knn_classifier(self.scores["knn"]["k"], self.temperature)
        return {
            Evaluation(probe="knn", classifier=nearest, checkpoint="last"),
            Evaluation(
                probe="linear", classifier="logistic regression on frozen features", checkpoint="last"
            ),
        }


def write_table(inputs: Mapping[str, Input], out: Path) -> dict[str, float]:
    """Write results.md and results.html.

    Args:
        inputs: of the roles in TABLE_ROLES.

    Returns:
        Accuracies as fractions, `knn_{method}` and `linear_{method}`; and how many of the published rows
        these can be compared with, `comparable`.

    Raises:
        UserError: if a run is of another method than its role.
    """
    runs = {method: _run(method, inputs) for method in METHODS}
    groups = {name: _rows(name, runs[method], PUBLISHED[method]) for method, name in METHODS.items()}
    random = (_score(inputs[f"{probe}_random"].receipt.metrics) for probe in PROBES)
    groups["random"] = [("Nothing learned", "here", _trunk(runs["swav"]), "0", "0", "", *random, "")]
    everything = [(run, row) for method, run in runs.items() for row in PUBLISHED[method]]
    comparable = sum(not why_not_comparable(run, row) for run, row in everything)
    lead = (
        f"{comparable} of the {len(everything)} published accuracies can be compared with ours: those with "
        "the same trunk, stem, epochs, filter of the crops, augmentation and evaluation."
    )
    notes = _notes(runs)
    write_atomically(out / "results.md", _markdown(lead, groups, notes))
    page = environment().get_template("cifar10.html")
    write_atomically(
        out / "results.html", page.render(lead=lead, columns=COLUMNS, groups=groups, notes=notes)
    )
    accuracies = {
        f"{probe}_{method}": float(metrics["top1"])
        for method, run in runs.items()
        for probe, metrics in run.scores.items()
    }
    return {**accuracies, "comparable": comparable}


def why_not_comparable(run: MethodRun, row: Published) -> list[str]:
    """In what a run differs from a published one, that its accuracy could not be held against it."""
    recipe, knn = run.recipe, run.scores["knn"]
    filters = {group.interpolation for group in recipe.data.crops}
    other = {
        "trunk": recipe.trunk.name != published.TRUNK,
        "stem": recipe.trunk.stem != row.source.stem,
        "epochs": abs(run.epochs - row.epochs) >= 0.5,
        "images": (run.images, knn["train_samples"], knn["test_samples"])
        != (published.TRAIN_IMAGES, published.TRAIN_IMAGES, published.TEST_IMAGES),
        "interpolation": filters != {row.source.interpolation},
        "augmentation": augmentation(recipe.data) != row.augmentation,
        "evaluation": row.source.evaluation not in run.evaluations,
    }
    return [name for name, differs in other.items() if differs]


def augmentation(data: Data) -> Augmentation:
    """What a recipe makes of an image, but for the filter of its crops, which has a name of its own."""
    plain = {"count": 1, "interpolation": CropGroup.model_fields["interpolation"].default}
    views = (group.model_copy(update=plain) for group in data.crops for _ in range(group.count))
    return Augmentation(views=tuple(views), mean=data.mean, std=data.std)


def _run(method: str, inputs: Mapping[str, Input]) -> MethodRun:
    receipt, scores = (
        inputs[f"run_{method}"].receipt,
        {probe: inputs[f"{probe}_{method}"].receipt for probe in PROBES},
    )
    recipe = PretrainRecipe.model_validate(receipt.recipe)
    if recipe.method.name != method:
        raise UserError(
            f"the table's input run_{method} is a run of {recipe.method.name}: name a stage of {method}"
        )
    return MethodRun(
        recipe=recipe,
        images=inputs["data"].receipt.metrics["kept"],
        steps=receipt.metrics["step"],
        seconds=receipt.seconds,
        machine=receipt.machine,
        scores={probe: score.metrics for probe, score in scores.items()},
        temperature=scores["knn"].recipe["temperature"],
    )


def _rows(name: str, run: MethodRun, others: tuple[Published, ...]) -> list[tuple[str, ...]]:
    """Ours, then theirs; a row has a text for each column."""
    length = (f"{run.epochs:.0f}" if run.epochs >= 10 else f"{run.epochs:.1f}", f"{run.steps:,}")
    batch = str(run.recipe.data.batch_size * run.recipe.train.accumulate)
    rows: list[tuple[str, ...]] = []
    rows.append((name, "here", _trunk(run), *length, batch, *map(_score, run.scores.values()), ""))
    for row in others:
        probe = row.source.evaluation.probe
        scores = dict.fromkeys(PROBES, "") | {probe: f"{100 * row.top1:.1f}"}
        ours = run.scores[probe]["top1"]
        differs = why_not_comparable(run, row)
        verdict = f"no: {', '.join(differs)}" if differs else f"yes, ours {100 * (ours - row.top1):+.1f}"
        setup = (f"{published.TRUNK}, {_STEMS[row.source.stem]}", str(row.epochs), "", str(row.batch_size))
        rows.append((name, row.source.name, *setup, *scores.values(), verdict))
    return rows


def _trunk(run: MethodRun) -> str:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_trunk(run.recipe.trunk).parameters())
    return f"{run.recipe.trunk.name}, {_STEMS[run.recipe.trunk.stem]}, {parameters / 1e6:.2f} M"


def _score(metrics: Mapping[str, Any]) -> str:
    low, high = 100 * metrics["top1_low"], 100 * metrics["top1_high"]
    return f"{100 * metrics['top1']:.1f} ({low:.1f} to {high:.1f})"


def _notes(runs: Mapping[str, MethodRun]) -> list[str]:
    run, knn = runs["swav"], runs["swav"].scores["knn"]
    times = ", ".join(f"{METHODS[method]} {duration(each.seconds)}" for method, each in runs.items())
    return [
        f"Top-1 on {knn['test_samples']:,} test images, in percent, with Wilson's 95 % interval. kNN: "
        f"{knn['train_samples']:,} training images, k = {knn['k']}, T = {run.temperature:g}. Linear: "
        "logistic regression on the frozen features. One seed each, the last checkpoint.",
        "Comparable: the same trunk, stem and epochs, all images of CIFAR-10, crops by the same filter, the "
        "same augmentation and normalisation, and the same classifier of the same checkpoint. Batch sizes, "
        "heads and optimizers may still differ; theirs have a standard error, too, of 0.3 to 0.4.",
        *(
            f"{source.name}: {source.measured}. {source.url}"
            for source in (published.LIGHTLY, published.SOLO_LEARN)
        ),
        f"Time of the pretraining here: {times}, on {run.machine}.",
    ]


def _markdown(lead: str, groups: Mapping[str, list[tuple[str, ...]]], notes: list[str]) -> str:
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(row for rows in groups.values() for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(["# CIFAR-10, beside published results", lead, table, *notes]) + "\n"
