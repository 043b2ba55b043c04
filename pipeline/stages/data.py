"""The stages that make or name datasets and checkpoints."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.map.processes import processes
from ingest.crawl.crawl import crawl_shards
from ingest.dataset import layout
from ingest.dataset.open import open_dataset
from ingest.dataset.view import duplicates_name, view_name
from ingest.dedup.dedup import dedup as find_duplicates
from ingest.filter.filter import Filter, filter_view
from ingest.filter.per_label import PerLabel
from ingest.image.check import Treatment
from ingest.plan.settings import VIDEOS, CrawlSettings
from ingest.progress.counts import Counts, Progress
from ingest.video.check import VideoTreatment
from pipeline.checkpoint.files import step_of
from pipeline.dag.digests import content_digest
from pipeline.dag.stage import Result, Work
from pipeline.hashtags.make_tags import make_tags
from pipeline.recipe.stages import CheckpointRecipe, DatasetRecipe, ShardsRecipe, SubsetRecipe
from pipeline.report.tags import PAGE, write_tags_page
from pipeline.stages.clips import make_clips
from pipeline.stages.inputs import opened
from pipeline.stages.photographs import cut_tiles

logger = logging.getLogger(__name__)


def photographs(work: Work) -> Result:
    """Tiles from photographs: train.tar and test.tar."""
    metrics = cut_tiles(work.recipe, work.folder)
    return Result(metrics, ["train.tar", "test.tar", "photographs.json", "overview"])


def clips(work: Work) -> Result:
    """Clips with sound, of two sets: the folders train and test, a sub-folder for each label."""
    metrics = make_clips(work.recipe, work.folder)
    return Result(metrics, ["train", "test", "clips.json"])


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
        _settings(recipe),
        workers=max(1, recipe.run.workers),
        progress=_now_and_then(work.folder.name),
    )
    counts = report.counts
    if not counts.kept:
        lost = ", ".join(
            f"{number:,} {reason}" for reason, number in (counts.rejected + counts.failed).items()
        )
        raise UserError(f"nothing of the source was kept ({lost}): see `ingest show {work.folder}`")
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


def _settings(recipe: ShardsRecipe) -> CrawlSettings:
    if recipe.videos is None:
        return CrawlSettings(unit_rows=recipe.unit_rows, treatment=Treatment(resize=recipe.resize))
    if recipe.resize is not None:
        raise UserError("a shards stage keeps videos as they are: leave recipe.resize out, or recipe.videos")
    treatment = VideoTreatment(
        segment_seconds=recipe.videos.segment_seconds, allow_silent=recipe.videos.allow_silent
    )
    return replace(VIDEOS, unit_rows=recipe.videos.unit_rows, video=treatment)


def dataset(work: Work) -> Result:
    """A link, `data`, to a dataset that others have made, and perhaps a view of it."""
    recipe = work.recipe
    there = open_dataset(recipe.path, sealed=recipe.sealed, view=recipe.view)
    _link(work.folder / "data", Path(recipe.path))
    view = {} if recipe.view is None else {"view": recipe.view}
    return Result({"root": there.root, "kept": len(there), **view}, [])


def subset(work: Work) -> Result:
    """`data`: the input's files, and a view of them."""
    source, recipe = work.inputs["data"], work.recipe
    root, within = source.receipt.metrics["root"], source.receipt.metrics.get("view")
    folder, view = _linked(work), work.folder.name
    with processes(max(1, recipe.run.workers)) as map_tasks:
        report = filter_view(
            folder,
            view,
            Filter(
                within=() if within is None else (within,),
                keep=() if recipe.keep is None else (recipe.keep,),
                per_label=recipe.per_label and PerLabel(count=recipe.per_label, seed=recipe.seed),
            ),
            sealed=root,
            map_tasks=map_tasks,
        )
    if not report.kept:
        raise UserError(f"nothing of {source.path} is in the subset: none of its images are in {recipe.keep}")
    metrics: dict[str, Any] = {"root": root, "view": view, "kept": report.kept}
    if report.drawn is not None:
        metrics |= {"labels": report.drawn.labels, "labels_with_fewer": len(report.drawn.short)}
    for listed in report.lists:
        metrics |= {"list_lines": listed.lines, "list_lines_unmatched": listed.unmatched}
    return Result(metrics, [f"data/{layout.VIEWS}/{view}.parquet"])


def dedup(work: Work) -> Result:
    """`data`: the input's files, and a view of them without duplicates, and without what equals or looks like
    an image of the input `against`.
    """
    source, recipe = work.inputs["data"], work.recipe
    root, within = source.receipt.metrics["root"], source.receipt.metrics.get("view")
    folder, view = _linked(work), work.folder.name
    with processes(max(1, recipe.run.workers)) as map_tasks:
        report = find_duplicates(
            folder,
            view,
            radius=recipe.hamming,
            against=[str(work.inputs["against"].path)] if "against" in work.inputs else [],
            within=within,
            sealed=root,
            scratch=work.folder,
            map_tasks=map_tasks,
        )
    metrics = {"root": root, "view": view, "kept": report.kept}
    metrics |= {"exact": report.exact, "near": report.near, "of_evaluation": report.evaluation}
    return Result(metrics, [f"data/{name}" for name in (view_name(view), duplicates_name(view))])


def _linked(work: Work) -> Path:
    """`data`: links to the files of the input of that name, and a folder for views, in which whoever made the
    input finds nothing new.
    """
    source, folder = work.inputs["data"], work.folder / "data"
    (folder / layout.VIEWS).mkdir(parents=True, exist_ok=True)
    for name in (layout.DATASET, layout.SEALED, layout.SHARDS, layout.META):
        _link(folder / name, source.path / name)
    if within := source.receipt.metrics.get("view"):
        _link(folder / view_name(within), source.path / view_name(within))
    return folder


def hashtags(work: Work) -> Result:
    """Tags of the input `data`, see `pipeline.data.tags`, and hashtags.html, a page of them. Where there is
    an input `classes`, what its labels name becomes a tag, and nothing else.
    """
    source, recipe = work.inputs["data"], work.recipe
    view = recipe.view or source.receipt.metrics.get("view")
    dataset = open_dataset(source.path, sealed=source.receipt.metrics["root"], view=view)
    if "classes" in work.inputs:
        if recipe.only is not None:
            raise UserError("recipe.only and the input `classes` both say what becomes a tag: leave one out")
        labels = opened(work.inputs["classes"]).vocabulary.names
        recipe = recipe.model_copy(update={"only": labels})
    with processes(max(1, recipe.run.workers)) as map_tasks:
        metrics = make_tags(dataset, recipe, work.folder, map_tasks=map_tasks)
    write_tags_page(dataset, work.folder)
    return Result(metrics, ["tags.json", "units.parquet", "units", PAGE])


def checkpoint(work: Work) -> Result:
    """A link, `checkpoint`, to one that a run has saved."""
    folder = Path(work.recipe.path)
    _link(work.folder / "checkpoint", folder)
    return Result({"step": step_of(folder)}, [])


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target.absolute())


def dataset_identity(recipe: DatasetRecipe) -> str:
    """What a dataset is: its root, and what its view keeps."""
    there = open_dataset(recipe.path, sealed=recipe.sealed, view=recipe.view)
    return there.root if there.view is None else f"{there.root} {there.view.digest}"


def subset_identity(recipe: SubsetRecipe) -> str:
    """What a list says, if there is one."""
    if recipe.keep is None and recipe.per_label is None:
        raise UserError("a subset needs per_label, a number of images, or keep, a list: give one or both")
    if recipe.keep is None:
        return ""
    if not Path(recipe.keep).is_file():
        raise UserError(f"a subset's list {recipe.keep} is not there: correct recipe.keep")
    return content_digest(Path(recipe.keep))


def checkpoint_identity(recipe: CheckpointRecipe) -> str:
    """What a checkpoint is: the digests of its files."""
    manifest = Path(recipe.path) / "manifest.json"
    if not manifest.is_file():
        raise UserError(
            f"{recipe.path} is not a checkpoint; give a folder RUN/checkpoints/step-… with a manifest.json"
        )
    return content_digest(manifest)


def _now_and_then(name: str, seconds: float = 10.0) -> Progress:
    """A crawl's progress as lines of the log."""
    due = time.monotonic() + seconds

    def progress(counts: Counts) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + seconds
            logger.info("%s: %d of %d images", name, counts.done, counts.planned)

    return progress
