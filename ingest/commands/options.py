"""Options that several commands have."""

from typing import Annotated

import typer

from ingest.dataset.keys import KEY_SLOTS

Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Workers = Annotated[int, typer.Option(min=1, help="How many at a time; never changes the result.")]
DatasetFolder = Annotated[
    str,
    typer.Argument(
        metavar="DATASET", help="A sealed dataset: its folder or URL (s3://, gs://, az://, https://)."
    ),
]
UnitRows = Annotated[int, typer.Option(min=1, max=KEY_SLOTS, help="Attempts per work unit and shard.")]
MaxBytes = Annotated[int, typer.Option(min=1, help="Larger files are rejected unread.")]
MaxPixels = Annotated[int, typer.Option(min=1, help="Images that claim more are rejected undecoded.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="CPU time that checking one image may take.")]
MemoryMb = Annotated[int, typer.Option(min=64, help="Memory that checking one image may take, MiB.")]
