"""Options that several commands have."""

from typing import Annotated

import typer

from ingest.dataset.keys import KEY_SLOTS
from ingest.labels.rule import PRESETS
from ingest.web.opt_outs import OptOut

Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Workers = Annotated[
    int, typer.Option(min=1, help="How many to run in parallel; the result is the same for any number.")
]
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
        help=f"How to derive labels from paths: {', '.join(PRESETS)}, or path:REGEX with a group "
        "(?P<label>…), and (?P<split>…). [default: the first folder]",
    ),
]
LabelFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--labels",
        metavar="FILE",
        help="A file of labels, split or ignore by path, name or key: .csv, .tsv, .json, .jsonl, .parquet, "
        ".txt; or VOC's ImageSets/Main. Repeatable.",
    ),
]
UnitRows = Annotated[int, typer.Option(min=1, max=KEY_SLOTS, help="Rows per work unit and shard.")]
MaxBytes = Annotated[int, typer.Option(min=1, help="Reject larger files unread.")]
MaxPixels = Annotated[int, typer.Option(min=1, help="Reject images that claim more, without decoding them.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="CPU time that checking one image may take.")]
MemoryMb = Annotated[int, typer.Option(min=64, help="Memory that checking one image may take, MiB.")]
IgnoreXRobots = Annotated[
    bool,
    typer.Option("--ignore-x-robots", help="Ignore X-Robots-Tag and robots <meta>; the output records this."),
]
IgnoreTdmReservation = Annotated[
    bool, typer.Option("--ignore-tdm-reservation", help="Ignore TDM-Reservation: 1; the output records this.")
]
IgnoreContentSignal = Annotated[
    bool,
    typer.Option(
        "--ignore-content-signal", help="Ignore Content-Signal: ai-train=no; the output records this."
    ),
]
IgnoreContentUsage = Annotated[
    bool,
    typer.Option("--ignore-content-usage", help="Ignore Content-Usage: train-ai=n; the output records this."),
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
