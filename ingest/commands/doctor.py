"""`ingest doctor`: what is installed and active, and how to mend what is not."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.doctor import Finding, doctor_report, doctor_table, package_check
from ingest.commands.options import Json
from ingest.fence.doctor import fence_check
from ingest.image.doctor import image_checks


def doctor(
    folder: Annotated[Path, typer.Argument(help="The folder that datasets would be written to.")] = Path(),
    as_json: Json = False,
) -> None:
    """Check what is installed and working, and say how to fix what is not."""
    pyav = package_check("av", remedy="pip install 'av>=18,<20'", purpose="videos: crawl-shards --video")
    checks: list[Finding] = [*image_checks(), pyav, fence_check(), *doctor_report(folder)]
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        Console().print(doctor_table(checks))
    if any(check.required and check.status == "missing" for check in checks):
        raise typer.Exit(1)
