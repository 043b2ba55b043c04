"""The report: one HTML page that needs nothing else, from the receipts and files of a graph's stages."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from pydantic import NonNegativeInt, PositiveInt

from cluster.atomic_file import write_atomically
from cluster.typed_yaml import Section, load_recipe
from ingest.dataset.open import Dataset, open_dataset
from pipeline.dag.stage import Input
from pipeline.recipe.data import Data
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.report.figures import Bar, Series, bar_chart, line_chart
from pipeline.report.gallery import Samples, crops_seen, data_uri, label_rows, nearest_rows
from pipeline.report.page import environment, read_rows
from pipeline.report.prototypes import prototype_gallery
from pipeline.transfer.features import Features, load_features

TRUNKS = {"trained": "trained trunk", "random": "random trunk", "pixels": "raw pixels"}
TONES = {"trained": "t1", "random": "t2", "pixels": "t3"}


class ReportRecipe(Section):
    """What is shown, and how much of it.

    The nearest prototypes of `prototype_sample` images of the pretraining are looked for.
    """

    title: str = "SEER pipeline"
    labels: PositiveInt = 14
    samples_per_label: PositiveInt = 4
    crop_rows: PositiveInt = 6
    queries: PositiveInt = 6
    neighbours: PositiveInt = 8
    prototypes: PositiveInt = 8
    images_per_prototype: PositiveInt = 8
    prototype_sample: PositiveInt = 5_000
    seed: NonNegativeInt = 0


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The stages that a report is made from.

    Attributes:
        data: the images of the pretraining.
        train, test: the labelled images of the evaluation.
        photographs: how tiles were cut, if these are tiles of photographs.
        knn_pixels, linear_pixels: scores of raw pixels; both or neither.
    """

    data: Input
    train: Input
    test: Input
    run: Input
    trunk: Input
    features: Input
    features_random: Input
    knn: Input
    knn_random: Input
    linear: Input
    linear_random: Input
    photographs: Input | None = None
    knn_pixels: Input | None = None
    linear_pixels: Input | None = None

    def trunks(self) -> dict[str, str]:
        """Trunk → its name for people, of those that were scored."""
        return {name: text for name, text in TRUNKS.items() if name != "pixels" or self.knn_pixels}

    def scores(self, probe: str) -> dict[str, dict[str, Any]]:
        """Trunk → metrics of a probe, "knn" or "linear"."""
        roles = {"trained": probe, "random": f"{probe}_random", "pixels": f"{probe}_pixels"}
        return {name: getattr(self, roles[name]).receipt.metrics for name in self.trunks()}


def build_report(evidence: Evidence, recipe: ReportRecipe, out: Path, *, device: torch.device) -> None:
    """Write the page; the device is for the images that are shown to prototypes."""
    run = evidence.run.path
    pretrain = load_recipe(PretrainRecipe, str(run / "recipe.yaml"), kind="pretrain")
    provenance = json.loads((evidence.trunk.path / "trunk.json").read_text())["provenance"]
    trained, random = (_features(source) for source in (evidence.features, evidence.features_random))
    same_images = evidence.data.receipt.metrics["root"] == evidence.train.receipt.metrics["root"]
    data_samples, train_samples, test_samples = (
        Samples(_opened(source)) for source in (evidence.data, evidence.train, evidence.test)
    )
    here = pretrain.model_copy(update={"data": _where_it_is_now(pretrain, evidence.data)})
    data_labels = _labels(trained[0]) if same_images else {}
    page = (
        environment()
        .get_template("report.html")
        .render(
            title=recipe.title,
            trunks=evidence.trunks(),
            tones=TONES,
            knn=evidence.scores("knn"),
            linear=evidence.scores("linear"),
            accuracy_chart=accuracy_chart(evidence),
            chance=1 / len(trained[0].classes),
            photographs=evidence.photographs and _photographs(evidence.photographs),
            same_images=same_images,
            data={name: getattr(evidence, name).receipt.metrics for name in ("data", "train", "test")},
            labels=label_rows(
                *trained, train_samples, test_samples, labels=recipe.labels, each=recipe.samples_per_label
            ),
            each=recipe.samples_per_label,
            label_count=len(trained[0].classes),
            pretrain=pretrain,
            provenance=provenance,
            feature_dim=trained[0].x.shape[1],
            hardware=hardware(run),
            machine=evidence.run.receipt.machine,
            wall=evidence.run.receipt.seconds,
            stages=_stages(evidence),
            curves=curves(run),
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
            recipe_text=yaml.safe_dump(
                pretrain.model_dump(mode="json", exclude={"run"}), sort_keys=False, width=80
            ),
        )
    )
    for samples in (data_samples, train_samples, test_samples):
        samples.close()
    write_atomically(out, page)


def accuracy_chart(evidence: Evidence) -> str:
    """kNN and linear accuracy of the three trunks, with a standard error."""
    groups = [
        (
            title,
            [
                Bar(
                    name=TRUNKS[trunk],
                    value=scores["top1"],
                    error=scores["standard_error"],
                    tone=TONES[trunk],
                )
                for trunk, scores in evidence.scores(probe).items()
            ],
        )
        for probe, title in (("knn", "Nearest neighbours"), ("linear", "Linear probe"))
    ]
    return bar_chart(groups, title="Accuracy on the test tiles")


def curves(run: Path) -> list[dict[str, Any]]:
    """Chart, title and meaning of each thing that a run records and that people look at."""
    metrics, timing = (read_rows(run / name) for name in ("metrics.jsonl", "timing.jsonl"))
    wanted = [
        (metrics, "loss", "Loss", "of the whole batch; SwAV's starts at the logarithm of its prototypes"),
        (metrics, "knn", "Nearest-neighbour accuracy", "percent, measured while training; it steers nothing"),
        (metrics, "lr", "Learning rate", "warm-up, then the schedule"),
        (metrics, "invariance", "Invariance", "how far the components of the two views are from agreeing"),
        (metrics, "redundancy", "Redundancy", "how much the components of the embedding repeat each other"),
        (metrics, "prototype_entropy", "Prototype entropy", "a fall to 0 would be a collapse"),
        (metrics, "embedding_std", "Embedding spread", "1 on the whole sphere; 0 would be a collapse"),
        (metrics, "rankme", "RankMe", "effective number of dimensions that the embedding uses"),
        (timing, "images_per_second", "Images per second", "source images, all crops of each"),
    ]
    charts = []
    for rows, key, title, meaning in wanted:
        found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if found:
            steps, values = zip(*found, strict=True)
            chart = line_chart([Series(name=title, x=steps, y=values)], title=title, x_label="step")
            charts.append({"title": title, "meaning": meaning, "chart": chart})
    return charts


def hardware(run: Path) -> dict[str, Any]:
    """Where the newest attempt of a run ran."""
    attempts = read_rows(run / "attempts.jsonl")
    return {**attempts[-1], "attempts": len(attempts)}


def _features(source: Input) -> tuple[Features, Features]:
    return load_features(source.path / "train.safetensors"), load_features(source.path / "test.safetensors")


def _labels(features: Features) -> dict[int, str]:
    pairs = zip(features.keys.tolist(), features.y.tolist(), strict=True)
    return {key: features.classes[label] for key, label in pairs}


def _opened(source: Input) -> Dataset:
    return open_dataset(source.path, sealed=source.receipt.metrics["root"])


def _where_it_is_now(pretrain: PretrainRecipe, data: Input) -> Data:
    """The recipe names the images as the run saw them; the graph's folder may have been moved since."""
    return pretrain.data.model_copy(update={"root": str(data.path)})


def _photographs(source: Input) -> dict[str, Any]:
    """What was cut and how, and an overview of the pictures."""
    cut = json.loads((source.path / "photographs.json").read_text())
    overview = []
    for row in cut["overview"]:
        with Image.open(source.path / row["file"]) as image:
            picture = data_uri(image, longest=320)
            overview.append({**row, "picture": picture, "ratio": image.width / image.height})
    return {**cut, "cut": source.receipt.recipe, "overview": overview}


def _stages(evidence: Evidence) -> list[dict[str, Any]]:
    inputs: list[Input | None] = [getattr(evidence, field.name) for field in fields(evidence)]
    receipts = {source.receipt.key: source.receipt for source in inputs if source is not None}
    return [
        {"name": receipt.stage, "seconds": receipt.seconds, "key": receipt.key[:12]}
        for receipt in sorted(receipts.values(), key=lambda receipt: receipt.started)
    ]
