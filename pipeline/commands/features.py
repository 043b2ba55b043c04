"""`submit features`: what a trunk makes of a dataset, as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import UserError
from pipeline.commands.options import Device
from pipeline.commands.transfer import LayerName, Trunk, WindowCount, Workers
from pipeline.recipe.stages import FeaturePrecision, Windows


def features(  # noqa: PLR0917 -- typer passes by name
    trunk: Trunk,
    data: Annotated[str, typer.Option("--data", help="A sealed dataset, with labels or without.")],
    output: Annotated[
        Path,
        typer.Option("--output", dir_okay=False, help="The file to write: NAME.parquet or NAME.safetensors."),
    ],
    view: Annotated[str | None, typer.Option("--view", help="A view of --data.")] = None,
    precision: Annotated[
        FeaturePrecision, typer.Option("--precision", help="Precision of the features; Parquet has no bf16.")
    ] = "fp32",
    windows: WindowCount = 10,
    each: Annotated[
        bool, typer.Option("--each/--mean", help="For videos: one row per window, or their mean.")
    ] = False,
    layer: LayerName = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    workers: Workers = 2,
    device: Device = "auto",
) -> None:
    """Write the features of every sample of a dataset to a file, with keys, paths, captions and labels."""
    from rich.console import Console

    from cluster.rank.torch_dist import choose_device
    from ingest.dataset.open import open_dataset
    from ingest.progress.meter import Meter
    from pipeline.transfer.feature_table import files_of, refuse_kind, rows_beside, write_table
    from pipeline.trunks.files import load_trunk

    refuse_kind(output, precision)
    if not force and (taken := [file for file in files_of(output) if file.exists()]):
        raise UserError(f"{taken[0]} already exists: name another --output, or use --force to replace it")
    where = choose_device(device)
    dataset, loaded = open_dataset(data, view=view), load_trunk(trunk).to(where)
    output.parent.mkdir(parents=True, exist_ok=True)
    with Meter(Console(stderr=True)) as meter:
        rows = write_table(
            loaded,
            dataset,
            output,
            workers=workers,
            device=where,
            precision=precision,
            videos=Windows(windows=windows, each=each, layer=layer),
            progress=lambda done, total: meter.tell(f"features of {data}", done=done, total=total),
        )
    beside = f"; its rows are described in {rows_beside(output)}" if output.suffix == ".safetensors" else ""
    typer.echo(f"{output}: {rows:,} rows{beside}")
