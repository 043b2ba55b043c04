"""`ingest index`: tars that others made become a dataset where they lie."""

from typing import Annotated

import typer
from rich.console import Console

from cluster.host import CORES
from ingest.commands.crawl import DEFAULTS, tell_crawl
from ingest.commands.options import (
    Json,
    LabelFiles,
    LabelsFrom,
    MaxBytes,
    MaxPixels,
    MemoryMb,
    Seconds,
    UnitRows,
    Workers,
)
from ingest.crawl.index import index_tars
from ingest.image.check import Treatment
from ingest.image.decode import ImageLimits
from ingest.plan.settings import CrawlSettings
from ingest.progress.crawl_progress import CrawlProgress
from ingest.progress.meter import Meter

LIMITS = DEFAULTS.treatment.limits


def index(
    tars: Annotated[
        list[str],
        typer.Argument(
            metavar="TAR...",
            help="Uncompressed tars: paths or s3://, gs:// or az:// URLs; * in the name.",
        ),
    ],
    *,
    output: Annotated[
        str,
        typer.Option(
            help="The dataset's folder or bucket (s3://, gs://, az://), which may be that of the tars."
        ),
    ],
    extend: Annotated[bool, typer.Option("--extend", help="Add these tars to an existing dataset.")] = False,
    labels_from: LabelsFrom = None,
    labels: LabelFiles = None,
    unit_rows: UnitRows = DEFAULTS.unit_rows,
    max_bytes: MaxBytes = LIMITS.max_bytes,
    max_pixels: MaxPixels = LIMITS.max_pixels,
    seconds: Seconds = DEFAULTS.seconds,
    memory_mb: MemoryMb = DEFAULTS.memory_mb,
    workers: Workers = CORES,
    as_json: Json = False,
) -> None:
    """Turn WebDataset tars into a dataset without copying them: images stay in the tars, unchanged.

    Nothing is re-encoded, and no metadata is stripped. Run again, it goes on where it stopped.
    """
    settings = CrawlSettings(
        unit_rows=unit_rows,
        treatment=Treatment(limits=ImageLimits(max_bytes=max_bytes, max_pixels=max_pixels)),
        seconds=seconds,
        memory_mb=memory_mb,
    )
    with Meter(Console(stderr=True)) as meter:
        progress = CrawlProgress(meter)
        report = index_tars(
            tars,
            output,
            settings,
            workers=workers,
            progress=progress,
            labels_from=labels_from,
            labels=labels or (),
            extend=extend,
        )
    tell_crawl(report, progress.seconds, as_json=as_json)
