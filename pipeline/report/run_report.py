"""The report: one HTML page that needs nothing else, from the receipts and files of a graph's stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from markupsafe import Markup

from cluster.atomic_file import write_atomically
from cluster.json_rows import read_rows
from cluster.typed_yaml import load_recipe
from ingest.dataset.open import Dataset, open_dataset
from ingest.image.decode import ImageError, decode
from pipeline.dag.stage import Input
from pipeline.recipe.data import Data
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.stages import ReportRecipe
from pipeline.recipe.transfer import KnnRecipe
from pipeline.report.feature_map import MOST, map_of
from pipeline.report.figures import Bar, bar_chart
from pipeline.report.gallery import Samples, crops_seen, data_uri, label_rows, nearest_rows, not_shown
from pipeline.report.page import environment
from pipeline.report.per_class import PerClass, per_class
from pipeline.report.prototypes import prototype_gallery
from pipeline.report.scores import SCORED_TRUNKS, scores_given, several_labels, shots_in
from pipeline.report.training_curves import training_curves
from pipeline.train.branch import read_parent
from pipeline.train.steering import read_changes
from pipeline.transfer.evaluations import EVALUATIONS
from pipeline.transfer.features import Features, load_features

TRUNK_TONES = {"trained": "t1", "random": "t2", "pixels": "t3"}


def build_report(
    inputs: Mapping[str, Input], recipe: ReportRecipe, out: Path, *, device: torch.device
) -> None:
    """Write the page.

    Args:
        inputs: `data`, the images of the pretraining; `train` and `test`, the labelled images of the
            evaluation; `run`, `trunk`, `features`, `features_random`; any of the roles in SCORES
            and SEVERAL_LABELS; and `photographs`, how tiles were cut, if these are tiles of photographs.
        device: for the images that are shown to the prototypes of SwAV.

    Raises:
        UserError: if there is no score, or none of the trained trunk to hold another one against.
    """
    run, scores = inputs["run"].path, scores_given(inputs)
    pretrain = load_recipe(PretrainRecipe, str(run / "recipe.yaml"), kind="pretrain")
    provenance = json.loads((inputs["trunk"].path / "trunk.json").read_text())["provenance"]
    trained, random = (_features(inputs[role]) for role in ("features", "features_random"))
    same_images = inputs["data"].receipt.metrics["root"] == inputs["train"].receipt.metrics["root"]
    data_samples, train_samples, test_samples = (
        Samples(_opened(inputs[role])) for role in ("data", "train", "test")
    )
    here = pretrain.model_copy(update={"data": _where_it_is_now(pretrain, inputs["data"])})
    data_labels = _labels(trained[0]) if same_images else {}
    page = (
        environment()
        .get_template("report.html")
        .render(
            title=recipe.title,
            trunks=_trunks(scores),
            trunk_names=SCORED_TRUNKS,
            evaluations=_evaluations(scores),
            accuracy_chart=accuracy_chart(scores),
            chance=1 / len(trained[0].classes),
            photographs=_photographs(inputs["photographs"]) if "photographs" in inputs else None,
            same_images=same_images,
            data={name: inputs[name].receipt.metrics for name in ("data", "train", "test")},
            labels=label_rows(
                *trained, train_samples, test_samples, labels=recipe.labels, each=recipe.samples_per_label
            ),
            each=recipe.samples_per_label,
            label_count=len(trained[0].classes),
            pretrain=pretrain,
            provenance=provenance,
            feature_dim=trained[0].x.shape[1],
            hardware=hardware(run),
            parent=read_parent(run),
            changes=read_changes(run),
            machine=inputs["run"].receipt.machine,
            wall=inputs["run"].receipt.seconds,
            stages=stages_of(inputs),
            curves=training_curves({"": run}),
            crops=crops_seen(here, data_samples, data_labels, count=recipe.crop_rows),
            gallery=prototype_gallery(
                run,
                here,
                data_samples,
                data_labels,
                rows=recipe.prototypes,
                images=recipe.images_per_prototype,
                sample=recipe.prototype_sample,
                seed=recipe.seed,
                device=device,
            ),
            queries=nearest_rows(
                {"trained": trained, "random": random},
                train_samples,
                test_samples,
                queries=recipe.queries,
                neighbours=recipe.neighbours,
                seed=recipe.seed,
            ),
            map=_map(trained[1], test_samples, seed=recipe.seed),
            several_labels=several_labels(inputs),
            shots=shots_in(several_labels(inputs)),
            per_class=_per_class(inputs, *trained, seed=recipe.seed, device=device),
            recipe_text=yaml.safe_dump(
                pretrain.model_dump(mode="json", exclude={"run"}), sort_keys=False, width=80
            ),
        )
    )
    for samples in (data_samples, train_samples, test_samples):
        samples.close()
    write_atomically(out, page)


def accuracy_chart(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Accuracy by each evaluation of each trunk, with its interval."""
    groups = [
        (
            EVALUATIONS[name].title,
            [
                Bar(
                    name=SCORED_TRUNKS[trunk],
                    value=metrics["top1"],
                    low=metrics["top1_low"],
                    high=metrics["top1_high"],
                    tone=TRUNK_TONES[trunk],
                )
                for trunk, metrics in of_trunks.items()
            ],
        )
        for name, of_trunks in scores.items()
    ]
    return bar_chart(groups, title="Accuracy on the test tiles")


def _map(test: Features, samples: Samples, *, seed: int) -> Markup | None:
    """Of test images drawn by the seed, with their labels."""
    drawn = torch.randperm(len(test.y), generator=torch.Generator().manual_seed(seed))[:MOST]
    labels = dict(zip(test.keys.tolist(), (test.classes[label] for label in test.y.tolist()), strict=True))
    return map_of(test.keys[drawn], test.x[drawn], samples, labels, seed=seed)


def _per_class(
    inputs: Mapping[str, Input], train: Features, test: Features, *, seed: int, device: torch.device
) -> PerClass | None:
    """By the kNN that the page shows the accuracy of."""
    if "knn" not in inputs:
        return None
    recipe = KnnRecipe.model_validate(inputs["knn"].receipt.recipe)
    return per_class(train, test, k=recipe.k[0], temperature=recipe.temperature, seed=seed, device=device)


def _trunks(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Trunk → its name for people, of those that were scored."""
    return {
        trunk: name
        for trunk, name in SCORED_TRUNKS.items()
        if any(trunk in found for found in scores.values())
    }


def _evaluations(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What the page says of each evaluation, and trunk → its metrics."""
    return [
        {
            "title": EVALUATIONS[name].title,
            "column": EVALUATIONS[name].column,
            "explained": EVALUATIONS[name].explained.format(**found["trained"]),
            "scores": found,
        }
        for name, found in scores.items()
    ]


def hardware(run: Path) -> dict[str, Any]:
    """Where the newest attempt of a run ran."""
    attempts = list(read_rows(run / "attempts.jsonl"))
    return {**attempts[-1], "attempts": len(attempts)}


def _features(source: Input) -> tuple[Features, Features]:
    return load_features(source.path / "train.safetensors"), load_features(source.path / "test.safetensors")


def _labels(features: Features) -> dict[int, str]:
    pairs = zip(features.keys.tolist(), features.y.tolist(), strict=True)
    return {key: features.classes[label] for key, label in pairs}


def _opened(source: Input) -> Dataset:
    metrics = source.receipt.metrics
    return open_dataset(source.path, sealed=metrics["root"], view=metrics.get("view"))


def _where_it_is_now(pretrain: PretrainRecipe, data: Input) -> Data:
    """The recipe names the images as the run saw them; the graph's folder may have been moved since."""
    return pretrain.data.model_copy(update={"root": str(data.path)})


def _photographs(source: Input) -> dict[str, Any]:
    """What was cut and how, and an overview of the pictures."""
    cut = json.loads((source.path / "photographs.json").read_text())
    overview = []
    for row in cut["overview"]:
        # By the rules for strangers' pictures, and of this folder alone: others may have written these files.
        path = source.path / "overview" / Path(row["file"]).name
        try:
            image = decode(path.read_bytes())
        except ImageError as error:
            image = not_shown(str(path), error)
        picture = data_uri(image, longest=320)
        overview.append({**row, "picture": picture, "ratio": image.width / image.height})
    return {**cut, "cut": source.receipt.recipe, "overview": overview}


def stages_of(inputs: Mapping[str, Input]) -> list[dict[str, Any]]:
    """The stages that a page was made of, as they ran."""
    receipts = {source.receipt.key: source.receipt for source in inputs.values()}
    return [
        {"name": receipt.stage, "seconds": receipt.seconds, "key": receipt.key[:12]}
        for receipt in sorted(receipts.values(), key=lambda receipt: receipt.started)
    ]
