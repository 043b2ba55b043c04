"""`ingest gc`: delete what committed units left behind and no commit names."""

import json
from typing import Annotated

import typer

from cluster.wording import in_bytes, several, visible
from ingest.commands.options import Json
from ingest.dataset.gc import find_garbage


def gc(
    dataset: Annotated[
        str,
        typer.Argument(metavar="DATASET", help="A dataset: its folder or bucket (s3://, gs://, az://)."),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be deleted, and delete nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete leftover files that no plan or committed unit refers to. Safe during a crawl."""
    store, garbage = find_garbage(dataset)
    entries = []
    for entry in garbage:
        if not dry_run:
            store.delete(entry)
        if not as_json:
            typer.echo(f"{visible(entry.name)}  {in_bytes(entry.bytes)}")
        entries.append(entry)
    size = sum(entry.bytes for entry in entries)
    if as_json:
        files = [{"name": entry.name, "bytes": entry.bytes} for entry in entries]
        answer = {"path": dataset, "deleted": not dry_run, "bytes": size, "files": files}
        typer.echo(json.dumps(answer, indent=2))
    else:
        told = "would be deleted from" if dry_run else "deleted from"
        typer.echo(f"{several(len(entries), 'file')}, {in_bytes(size)}, {told} {visible(dataset)}")
