"""The stages that make or name datasets and checkpoints."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from cluster.errors import UserError
from cluster.map.processes import processes
from ingest.crawl.crawl import crawl_shards
from ingest.dataset.open import open_dataset
from ingest.image.check import Treatment
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import Counts, Progress
from pipeline.checkpoint.files import step_of
from pipeline.dag.digests import content_digest
from pipeline.dag.stage import Result, Work
from pipeline.hashtags.make_tags import make_tags
from pipeline.recipe.stages import CheckpointRecipe, DatasetRecipe
from pipeline.report.tags import PAGE, write_tags_page
from pipeline.stages.photographs import cut_tiles

logger = logging.getLogger(__name__)


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


def dataset(work: Work) -> Result:
    """A link, `data`, to a dataset that others have made."""
    opened = open_dataset(work.recipe.path, sealed=work.recipe.sealed)
    _link(work.folder / "data", Path(work.recipe.path))
    return Result({"root": opened.root, "kept": len(opened)}, [])


def hashtags(work: Work) -> Result:
    """Tags of the input `data`, see `pipeline.data.tags`, and hashtags.html, a page of them."""
    source, recipe = work.inputs["data"], work.recipe
    dataset = open_dataset(source.path, sealed=source.receipt.metrics["root"], view=recipe.view)
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
    """What a dataset is: its root."""
    return open_dataset(recipe.path, sealed=recipe.sealed).root


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
