"""Fine-tuned classifiers of a graph, with what is known of how each came to be; several seeds are one row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import torch
from pydantic import ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cluster.errors import UserError
from pipeline.dag.lineage import origin
from pipeline.dag.stage import Input
from pipeline.models.classifier import Classifier, LinearHead
from pipeline.models.trunk import build_trunk
from pipeline.recipe.pretrain import PretrainRecipe
from pipeline.recipe.trunk import Architecture
from pipeline.report.comparable import TOP1, Setup, differences
from pipeline.train.length import epochs_in
from pipeline.transfer.compare import compare_predictions
from pipeline.transfer.predict import read_predictions
from pipeline.transfer.statistics import Interval, compare_seeds, holm, mean_of_seeds
from pipeline.trunks.classifier import ClassifierSpec, read_classifier_spec
from pipeline.trunks.files import images_of, read_spec

_SEED = re.compile(r"_seed\d+$")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to a classifier; None where something is not known.

    Attributes:
        name: the role, without its seed. roles: of each training. scores: its accuracy, a fraction.
        top1, interval: over the seeds by Student's t, of one training over the test images by Wilson.
        method: of the pretraining, for people. images: what it had. images_seen: with repetitions.
        tagged_share: of the images, those with hashtags, where it was shown no others.
        gmac: multiply-adds in 10^9 of a test image.
        gpu_hours: of a pretraining and its fine-tuning; mean over the seeds.
        linear: accuracy of a linear probe of the same trunk; mean over the seeds.
        p: that it is as good as `against`, the best row that was tested alike, corrected for the number of
            rows (Holm).
    """

    name: str
    roles: tuple[str, ...]
    scores: tuple[float, ...]
    top1: float
    interval: Interval
    setup: Setup
    architecture: str
    parameters: int
    gmac: float
    method: str
    images: int | None
    images_seen: int | None
    curated: bool | None
    tagged_share: float | None
    gpu_hours: float | None
    linear: float | None
    p: float | None = None
    against: str | None = None


def read_rows(inputs: Mapping[str, Input], *, curated: Sequence[str]) -> list[Row]:
    """Rows of finished stages, the best one first.

    Args:
        inputs: role → stage: fine-tunings, and linear probes of the same trunks.
        curated: names of rows whose images were chosen.

    Raises:
        UserError: if a stage is of another kind, was not tested, or is no seed of what it is named after.
    """
    for role, source in inputs.items():
        if source.receipt.kind not in ("finetune", "linear"):
            raise UserError(
                f"input {role} is a stage of kind {source.receipt.kind}: figures are made from stages of "
                "kind finetune, and linear beside them"
            )
    tuned = sorted(role for role in inputs if inputs[role].receipt.kind == "finetune")
    if not tuned:
        raise UserError("there is no classifier to show: give figures a stage of kind finetune as an input")
    linear = _linear_probes(inputs)
    read = [_read_one(role, inputs[role], linear) for role in sorted(tuned, key=_name)]
    rows = [_row(name, list(seeds), inputs) for name, seeds in groupby(read, key=lambda one: one.name)]
    if unknown := set(curated) - {row.name for row in rows}:
        raise UserError(
            f"curated names {sorted(unknown)[0]}, and there is no such row: "
            f"there are {', '.join(row.name for row in rows)}"
        )
    rows = [replace(row, curated=row.name in curated if curated else None) for row in rows]
    rows.sort(key=lambda row: -row.top1)
    return _with_p(rows, inputs)


def _name(role: str) -> str:
    return _SEED.sub("", role)


def _linear_probes(inputs: Mapping[str, Input]) -> dict[str, float]:
    """Key of a trunk → accuracy of its linear probe."""
    found = {}
    for role, source in inputs.items():
        if source.receipt.kind == "linear":
            features = origin(source.receipt, "features", source.path.parent)
            if features is None or "trunk" not in features.receipt.inputs:
                raise UserError(f"of input {role} it cannot be told whose features it is of: they are gone")
            found[features.receipt.inputs["trunk"]] = float(source.receipt.metrics["top1"])
    trunks = {source.receipt.inputs.get("trunk") for source in inputs.values()}
    if strange := set(found) - trunks:
        raise UserError(
            f"a linear probe among the inputs is of trunk {sorted(strange)[0][:12]}, and no fine-tuning "
            "there starts from it: leave it out"
        )
    return found


def _read_one(role: str, source: Input, linear: Mapping[str, float]) -> Row:
    """One training as a row."""
    receipt = source.receipt
    if "top1" not in receipt.metrics:
        raise UserError(f"input {role} was not tested: give that stage of kind finetune the input test")
    spec = read_classifier_spec(source.path / "classifier")
    recipe = PretrainRecipe.model_validate(receipt.recipe)
    tested, metrics = recipe.test, receipt.metrics
    plain = tested is None or (tested.predict.classes is None and not tested.predict.only_shared)
    parameters, gmac = _size(
        spec.architecture, spec.feature_dim, len(spec.classes), images_of(spec.preprocessing).image_size
    )
    trunk = origin(receipt, "trunk", source.path.parent)
    return Row(
        name=_name(role),
        roles=(role,),
        scores=(float(metrics["top1"]),),
        top1=float(metrics["top1"]),
        interval=Interval(low=metrics["top1_low"], high=metrics["top1_high"]),
        setup=Setup(
            trunk=_architecture(spec),
            px=images_of(spec.preprocessing).image_size,
            epochs=_epochs(recipe, spec.provenance),
            test_set=(int(metrics["samples"]), len(spec.classes)),
            metric=TOP1 if plain else "top-1 by a map of classes",
        ),
        architecture=_architecture(spec),
        parameters=parameters,
        gmac=gmac,
        curated=None,
        linear=linear.get(receipt.inputs.get("trunk", "")),
        **_pretraining(trunk, receipt.gpu_hours),
    )


def _epochs(recipe: PretrainRecipe, provenance: Mapping[str, Any]) -> float | None:
    if recipe.train.epochs is not None:
        return float(recipe.train.epochs)
    if not {"samples", "steps"} <= provenance.keys():
        return None
    return epochs_in(recipe, samples=provenance["samples"], steps=provenance["steps"])


@cache
def _size(architecture: Architecture, feature_dim: int, classes: int, side: int) -> tuple[int, float]:
    """Parameters of trunk and classifier, and 10^9 multiply-adds of one test image; nothing is computed."""
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = Classifier(build_trunk(architecture), LinearHead(feature_dim, classes)).eval()
        network(torch.empty(1, 3, side, side))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() / 2e9


def _architecture(spec: ClassifierSpec) -> str:
    it = spec.architecture
    name: str = it.name
    if it.regnet is not None:
        name += f" ({', '.join(f'{key} {value}' for key, value in it.regnet.model_dump().items())})"
    return name if it.stem == "imagenet" else f"{name}, {it.stem.replace('_', ' ')} stem"


def _pretraining(trunk: Input | None, gpu_hours: float) -> dict[str, Any]:
    """What the trunk's files, and receipts where there are some, say of how it was made.

    Args:
        gpu_hours: of the fine-tuning.
    """
    unknown = dict.fromkeys(("images", "images_seen", "tagged_share", "gpu_hours"))
    if trunk is None:
        return unknown | {"method": "not known"}
    root = trunk.path.parent
    run = origin(trunk.receipt, "run", root)
    tags = origin(run.receipt, "tags", root) if run else None
    hours = gpu_hours + run.receipt.gpu_hours if run else None
    if trunk.receipt.kind == "random_trunk":
        made = {"method": "nothing learned", "images": 0, "images_seen": 0}
        return unknown | made | {"gpu_hours": gpu_hours or None}
    found = read_spec(trunk.path).provenance
    try:
        recipe = PretrainRecipe.model_validate(found.get("recipe"))
    except ValidationError:
        return unknown | {"method": str(found.get("method") or found.get("what", "not known"))}
    return {
        "method": "Hashtags" if tags and recipe.method.supervised else recipe.method.title,
        "images": found.get("images", found.get("samples")),
        "images_seen": found["steps"] * recipe.data.batch_size * recipe.train.accumulate,
        "tagged_share": tags.receipt.metrics.get("tagged_share") if tags else None,
        "gpu_hours": hours or None,  # of CPUs none are counted
    }


def _row(name: str, seeds: Sequence[Row], inputs: Mapping[str, Input]) -> Row:
    """Several trainings as one row."""
    first = seeds[0]
    if len(seeds) == 1:
        return first
    for other in seeds[1:]:
        if differ := differences(first.setup, other.setup):
            raise UserError(
                f"{first.roles[0]} and {other.roles[0]} differ in {', '.join(differ)}: they are no seeds of "
                "one thing; give them names that differ in more than _seedN"
            )
    if len({inputs[each.roles[0]].receipt.key for each in seeds}) < len(seeds):
        raise UserError(f"the seeds of {name} are the same training more than once: give each its own seed")
    mean, interval = mean_of_seeds([each.top1 for each in seeds])
    return replace(
        first,
        roles=tuple(each.roles[0] for each in seeds),
        scores=tuple(each.top1 for each in seeds),
        top1=mean,
        interval=Interval(low=max(0.0, interval.low), high=min(1.0, interval.high)),
        gpu_hours=_mean([each.gpu_hours for each in seeds]),
        linear=_mean([each.linear for each in seeds]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _with_p(rows: list[Row], inputs: Mapping[str, Input]) -> list[Row]:
    """The rows, best first, with p. Seeds are the units where both have several."""
    against: dict[str, tuple[str, float]] = {}
    for index, row in enumerate(rows):
        best = next((one for one in rows[:index] if not differences(one.setup, row.setup)), None)
        if best is not None and (p := _p(best, row, inputs)) is not None:
            against[row.name] = (best.name, p)
    corrected = dict(zip(against, holm([p for _, p in against.values()]), strict=True))
    return [
        replace(row, p=corrected[row.name], against=against[row.name][0]) if row.name in against else row
        for row in rows
    ]


def _p(best: Row, row: Row, inputs: Mapping[str, Input]) -> float | None:
    if len(row.roles) > 1 or len(best.roles) > 1:
        return compare_seeds(best.scores, row.scores)
    tables = {
        role: read_predictions(inputs[role].path / "predictions.parquet")
        for role in (best.roles[0], row.roles[0])
    }
    try:
        return compare_predictions(tables).pairs[0].paired.p
    except UserError:  # not of the same images
        return None
