"""The kinds of stages: plain functions from recipe and inputs to files and numbers, and the table of them."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.job import Job, Resources
from cluster.run.folder import RunFolder
from cluster.typed_yaml import Section
from ingest.crawl.crawl import Counts, CrawlSettings, Progress, crawl_shards
from ingest.dataset.open import open_dataset
from ingest.image.check import Treatment
from pipeline.checkpoint.files import step_of
from pipeline.dag.ensure import Kind, Result, Work, content_digest, folder_identity
from pipeline.recipe import KnnRecipe, LinearRecipe, PretrainRecipe, Run
from pipeline.report.cifar10 import ROLES as CIFAR10_ROLES
from pipeline.report.cifar10 import Cifar10TableRecipe, write_table
from pipeline.report.compare import CompareRecipe, compare_runs, comparison_page
from pipeline.report.run_report import Evidence, ReportRecipe, build_report
from pipeline.stages.photographs import PhotographsRecipe, cut_tiles, identity
from pipeline.transfer.features import extract_from_files, load_features, save_features
from pipeline.transfer.knn import knn
from pipeline.transfer.linear import linear_probe
from pipeline.trunks.export import export_trunk, pixels_trunk, random_trunk, read_spec

logger = logging.getLogger(__name__)


class Machine(Section):
    """Where a stage runs; changes no number."""

    workers: NonNegativeInt = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ShardsRecipe(Section):
    """A crawl: of the input `source`, or of a folder or tar at `source`."""

    source: str | None = None
    resize: PositiveInt | None = None
    unit_rows: PositiveInt = 16_384
    run: Machine = Machine()


class ExportRecipe(Section):
    """The newest checkpoint of a run is exported as it is: the trunk that learns, or its teacher."""

    which: Literal["student", "teacher"] = "student"


class DatasetRecipe(Section):
    """A sealed dataset that is there already: its folder, and the root to pin, if not the latest."""

    path: str
    sealed: str | None = None


class CheckpointRecipe(Section):
    """A checkpoint of a run: the folder `RUN/checkpoints/step-…`."""

    path: str


class RandomTrunkRecipe(Section):
    """A trunk like the input `like`, with weights drawn from the seed."""

    seed: NonNegativeInt = 0
    run: Machine = Machine()


class PixelsRecipe(Section):
    """Raw pixels of a square of `size`."""

    size: PositiveInt = 16


class FeaturesRecipe(Section):
    """Features of the inputs `train` and `test`, with the trunk's own preprocessing."""

    run: Machine = Machine()


def photographs(work: Work) -> Result:
    """Tiles from photographs: train.tar and test.tar."""
    metrics = cut_tiles(work.recipe, work.folder)
    return Result(metrics, ["train.tar", "test.tar", "photographs.json", "overview"])


def shards(work: Work) -> Result:
    """A sealed dataset, in the stage's folder itself."""
    source, recipe = work.inputs.get("source"), work.recipe
    if (source is None) == (recipe.source is None):
        raise UserError(
            "a shards stage takes its images from the input `source`, or from recipe.source: give one"
        )
    report = crawl_shards(
        [str(source.path) if source is not None else recipe.source],
        work.folder,
        CrawlSettings(unit_rows=recipe.unit_rows, treatment=Treatment(resize=recipe.resize)),
        workers=max(1, recipe.run.workers),
        progress=_now_and_then(work.folder.name),
    )
    counts = report.counts
    metrics = {
        "root": report.root,
        "planned": counts.planned,
        "kept": counts.kept,
        "rejected": counts.rejected.total(),
        "failed": counts.failed.total(),
        "bytes": counts.bytes_stored,
    }
    # The root is the digest of everything that was crawled; hashing terabytes again would say nothing more.
    return Result(metrics, ["DATASET.json", f"sealed/{report.root}.json", f"sealed/{report.root}.parquet"])


def dataset(work: Work) -> Result:
    """A link, `data`, to a dataset that others have made."""
    opened = open_dataset(work.recipe.path, sealed=work.recipe.sealed)
    _link(work.folder / "data", Path(work.recipe.path))
    return Result({"root": opened.root, "kept": len(opened)}, [])


def checkpoint(work: Work) -> Result:
    """A link, `checkpoint`, to one that a run has saved."""
    folder = Path(work.recipe.path)
    _link(work.folder / "checkpoint", folder)
    return Result({"step": step_of(folder)}, [])


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target.absolute())


def _manifest(recipe: CheckpointRecipe) -> str:
    """What a checkpoint is: the digests of its files."""
    manifest = Path(recipe.path) / "manifest.json"
    if not manifest.is_file():
        raise UserError(
            f"{recipe.path} is not a checkpoint; give a folder RUN/checkpoints/step-… with a manifest.json"
        )
    return content_digest(manifest)


def train_job(work: Work, resources: Resources) -> Job:
    """The training in the stage's folder; it goes on with what an interrupted one has saved."""
    recipe: PretrainRecipe = work.recipe
    data = {"root": str(work.inputs["data"].path), "sealed": work.inputs["data"].receipt.metrics["root"]}
    changes: dict[str, Any] = {"data": recipe.data.model_copy(update=data)}
    if recipe.probe is not None:
        if not {"probe_train", "probe_test"} <= work.inputs.keys():
            raise UserError("the recipe has a probe: give the stage the inputs probe_train and probe_test")
        paths = {name: str(work.inputs[f"probe_{name}"].path) for name in ("train", "test")}
        changes["probe"] = recipe.probe.model_copy(update=paths)
    return pretrain_job(recipe.model_copy(update=changes), work.folder, resources)


def trained(work: Work) -> Result:
    """A run folder, complete."""
    rows = (work.folder / "metrics.jsonl").read_text().splitlines()
    metrics = {name: value for name, value in json.loads(rows[-1]).items() if isinstance(value, int | float)}
    outputs = ["checkpoints", "recipe.yaml", "metrics.jsonl", "timing.jsonl"]
    return Result(metrics, outputs, job=RunFolder(work.folder).read_status().until_now())


def export(work: Work) -> Result:
    """An exported trunk, from the run's newest checkpoint."""
    spec = export_trunk(work.inputs["run"].path, work.folder, which=work.recipe.which)
    return Result({"feature_dim": spec.feature_dim, "steps": spec.provenance["steps"]}, TRUNK_FILES)


def random(work: Work) -> Result:
    """The same architecture with drawn weights, calibrated on the training images."""
    device = pick_device(work.recipe.run.device)
    spec = read_spec(work.inputs["like"].path)
    random_trunk(
        spec,
        open_dataset(work.inputs["data"].path),
        seed=work.recipe.seed,
        out=work.folder,
        workers=work.recipe.run.workers,
        device=device,
    )
    return Result({"feature_dim": spec.feature_dim}, TRUNK_FILES, _gpus(device))


def pixels(work: Work) -> Result:
    """Raw pixels as a trunk."""
    spec = pixels_trunk(read_spec(work.inputs["like"].path), size=work.recipe.size, out=work.folder)
    return Result({"feature_dim": spec.feature_dim}, TRUNK_FILES)


def features(work: Work) -> Result:
    """train.safetensors and test.safetensors."""
    device = pick_device(work.recipe.run.device)
    train, test = extract_from_files(
        work.inputs["trunk"].path,
        open_dataset(work.inputs["train"].path),
        open_dataset(work.inputs["test"].path),
        workers=work.recipe.run.workers,
        device=device,
    )
    save_features(train, work.folder / "train.safetensors")
    save_features(test, work.folder / "test.safetensors")
    metrics = {"train_samples": len(train.y), "test_samples": len(test.y), "feature_dim": train.x.shape[1]}
    return Result(metrics, ["train.safetensors", "test.safetensors"], _gpus(device))


def score_knn(work: Work) -> Result:
    """Weighted kNN on extracted features."""
    folder, device = work.inputs["features"].path, pick_device("auto")
    train, test = (load_features(folder / f"{name}.safetensors") for name in ("train", "test"))
    return Result(knn(train, test, work.recipe, device=device).metrics(), [], _gpus(device))


def score_linear(work: Work) -> Result:
    """Linear probe on extracted features."""
    folder, device = work.inputs["features"].path, pick_device("auto")
    train, test = (load_features(folder / f"{name}.safetensors") for name in ("train", "test"))
    return Result(linear_probe(train, test, work.recipe, device=device).metrics(), [], _gpus(device))


def report(work: Work) -> Result:
    """report.html, and the headline numbers."""
    evidence, device = Evidence(**work.inputs), pick_device("auto")
    build_report(evidence, work.recipe, work.folder / "report.html", device=device)
    return Result({}, ["report.html"], _gpus(device))


def compare(work: Work) -> Result:
    """compare.html: the inputs are runs, and their roles are the names of these on the page."""
    runs = compare_runs({name: source.path for name, source in work.inputs.items()})
    write_atomically(work.folder / "compare.html", comparison_page(runs, work.recipe))
    return Result({run.name: run.to_json() for run in runs}, ["compare.html"])


def cifar10_table(work: Work) -> Result:
    """results.md and results.html: what was reached, beside what others have published."""
    return Result(write_table(work.inputs, work.folder), ["results.md", "results.html"])


def _one_gpu(recipe: Section, gpus_per_node: int | None) -> Resources:
    there = torch.cuda.device_count() if gpus_per_node is None else gpus_per_node
    return Resources(gpus_per_rank=min(1, there))


def _one_gpu_or_none(recipe: RandomTrunkRecipe | FeaturesRecipe, gpus_per_node: int | None) -> Resources:
    """One, unless the recipe wants the CPU."""
    return Resources() if recipe.run.device == "cpu" else _one_gpu(recipe, gpus_per_node)


TRUNK_FILES = ["trunk.safetensors", "trunk.json", "README.md"]
REPORT_OPTIONAL = frozenset({"photographs", "knn_pixels", "linear_pixels"})
REPORT_INPUTS = frozenset(Evidence.__dataclass_fields__) - REPORT_OPTIONAL

KINDS: dict[str, Kind] = {
    "photographs": Kind(recipe=PhotographsRecipe, run=photographs, outside=identity),
    "shards": Kind(
        recipe=ShardsRecipe,
        run=shards,
        optional=frozenset({"source"}),
        outside=lambda recipe: folder_identity(Path(recipe.source)) if recipe.source else "",
    ),
    "dataset": Kind(
        recipe=DatasetRecipe,
        run=dataset,
        outside=lambda recipe: open_dataset(recipe.path, sealed=recipe.sealed).root,
    ),
    "checkpoint": Kind(recipe=CheckpointRecipe, run=checkpoint, outside=_manifest),
    "pretrain": Kind(
        recipe=PretrainRecipe,
        run=trained,
        job=train_job,
        resources=lambda recipe, gpus: resources_for(recipe.run, gpus_per_node=gpus),
        inputs=frozenset({"data"}),
        optional=frozenset({"probe_train", "probe_test"}),
    ),
    "export": Kind(recipe=ExportRecipe, run=export, inputs=frozenset({"run"})),
    "random_trunk": Kind(
        recipe=RandomTrunkRecipe, run=random, resources=_one_gpu_or_none, inputs=frozenset({"like", "data"})
    ),
    "pixels": Kind(recipe=PixelsRecipe, run=pixels, inputs=frozenset({"like"})),
    "features": Kind(
        recipe=FeaturesRecipe,
        run=features,
        resources=_one_gpu_or_none,
        inputs=frozenset({"trunk", "train", "test"}),
    ),
    "knn": Kind(recipe=KnnRecipe, run=score_knn, resources=_one_gpu, inputs=frozenset({"features"})),
    "linear": Kind(recipe=LinearRecipe, run=score_linear, resources=_one_gpu, inputs=frozenset({"features"})),
    "report": Kind(
        recipe=ReportRecipe,
        run=report,
        resources=_one_gpu,
        inputs=REPORT_INPUTS,
        optional=REPORT_OPTIONAL,
        version=3,
    ),
    "compare": Kind(recipe=CompareRecipe, run=compare, alike=2),
    "cifar10_table": Kind(recipe=Cifar10TableRecipe, run=cifar10_table, inputs=CIFAR10_ROLES),
}


def pretrain_job(recipe: PretrainRecipe, folder: Path, resources: Resources) -> Job:
    """The job that trains this recipe in a run folder."""
    return Job(
        name=recipe.run.name or folder.name,
        function="pipeline.train.loop:run_pretrain",
        arguments={"recipe": recipe.model_dump(mode="json"), "folder": str(folder)},
        resources=resources,
        folder=folder,
    )


def resources_for(run: Run, *, gpus_per_node: int | None = None) -> Resources:
    """What a recipe's `run` section asks for: by default one rank per GPU, or one on the CPU.

    Args:
        gpus_per_node: of the machines it will run on; None: like this one.

    Raises:
        UserError: if there are fewer GPUs than ranks.
    """
    there = torch.cuda.device_count() if gpus_per_node is None else gpus_per_node
    gpus = 0 if run.device == "cpu" else there
    ranks = run.ranks_per_node or max(1, gpus)
    if gpus and ranks > gpus:
        raise UserError(
            f"{ranks} ranks need {ranks} GPUs, there are {gpus}: use --ranks {gpus} or run.device=cpu"
        )
    return Resources(nodes=run.nodes, ranks_per_node=ranks, gpus_per_rank=1 if gpus else 0)


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """`auto` is the GPU if there is one."""
    return torch.device(
        "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")
    )


def _gpus(device: torch.device) -> int:
    return int(device.type == "cuda")


def _now_and_then(name: str, seconds: float = 10.0) -> Progress:
    """A crawl's progress as lines of the log."""
    due = time.monotonic() + seconds

    def progress(counts: Counts) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + seconds
            logger.info("%s: %d of %d images", name, counts.done, counts.planned)

    return progress
