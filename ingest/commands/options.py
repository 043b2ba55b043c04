"""Options that several commands have."""

from typing import Annotated

import typer

from ingest.dataset.keys import KEY_SLOTS
from ingest.labels.rule import PRESETS
from ingest.web.opt_outs import OptOut

Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Workers = Annotated[int, typer.Option(min=1, help="How many at a time; never changes the result.")]
DatasetFolder = Annotated[
    str,
    typer.Argument(
        metavar="DATASET", help="A sealed dataset: its folder or URL (s3://, gs://, az://, https://)."
    ),
]
LabelsFrom = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help=f"How labels are seen from paths: {', '.join(PRESETS)}, or path:REGEX with a group "
        "(?P<label>…), and (?P<split>…). [default: the first folder]",
    ),
]
LabelFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--labels",
        metavar="FILE",
        help="Labels, split and ignore by path, name or key: .csv, .tsv, .json, .jsonl, .parquet, .txt; "
        "VOC's ImageSets/Main. Repeatable.",
    ),
]
UnitRows = Annotated[int, typer.Option(min=1, max=KEY_SLOTS, help="Attempts per work unit and shard.")]
MaxBytes = Annotated[int, typer.Option(min=1, help="Larger files are rejected unread.")]
MaxPixels = Annotated[int, typer.Option(min=1, help="Images that claim more are rejected undecoded.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="CPU time that checking one image may take.")]
MemoryMb = Annotated[int, typer.Option(min=64, help="Memory that checking one image may take, MiB.")]
IgnoreXRobots = Annotated[
    bool,
    typer.Option("--ignore-x-robots", help="Do not heed X-Robots-Tag and robots <meta>; the output says so."),
]
IgnoreTdmReservation = Annotated[
    bool, typer.Option("--ignore-tdm-reservation", help="Do not heed TDM-Reservation: 1; the output says so.")
]
IgnoreContentSignal = Annotated[
    bool,
    typer.Option(
        "--ignore-content-signal", help="Do not heed Content-Signal: ai-train=no; the output says so."
    ),
]
IgnoreContentUsage = Annotated[
    bool,
    typer.Option("--ignore-content-usage", help="Do not heed Content-Usage: train-ai=n; the output says so."),
]


def end_if_nothing(kept: int) -> None:
    """A script that goes on with nothing fails later, and further away from what is wrong."""
    if not kept:
        raise typer.Exit(1)


def heeded(
    *,
    ignore_x_robots: bool,
    ignore_tdm_reservation: bool,
    ignore_content_signal: bool,
    ignore_content_usage: bool,
) -> frozenset[OptOut]:
    """The ways to opt out that are obeyed."""
    ignored = {
        OptOut.X_ROBOTS_TAG: ignore_x_robots,
        OptOut.TDM_RESERVATION: ignore_tdm_reservation,
        OptOut.CONTENT_SIGNAL: ignore_content_signal,
        OptOut.CONTENT_USAGE: ignore_content_usage,
    }
    return frozenset(opt_out for opt_out, ignore in ignored.items() if not ignore)
