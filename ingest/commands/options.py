"""Options that several commands have."""

import os
from typing import Annotated

import typer

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Workers = Annotated[int, typer.Option(min=1, help="How many at a time; never changes the result.")]
DatasetFolder = Annotated[
    str, typer.Argument(metavar="DATASET", help="A sealed dataset: its folder, or s3://bucket/prefix.")
]
