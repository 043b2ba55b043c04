"""The `ingest` command: images in the wild become sealed datasets, and datasets are looked at and checked."""

import logging
import sys
import warnings
from collections.abc import Iterable

import typer

from cluster.command_line import Debug, Version, make_app, run
from cluster.job import import_function

COMMANDS = {
    "crawl-shards": "ingest.commands.crawl:crawl",
    "urls": "ingest.commands.urls:urls",
    "index": "ingest.commands.index:index",
    "retry": "ingest.commands.retry:retry",
    "verify": "ingest.commands.verify:verify",
    "stats": "ingest.commands.stats:stats",
    "show": "ingest.commands.show:show",
    "dedup": "ingest.commands.dedup:dedup",
    "view": "ingest.commands.view:view",
    "card": "ingest.commands.card:card",
    "gc": "ingest.commands.gc:gc",
    "doctor": "ingest.commands.doctor:doctor",
}


def app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The program, with these of its commands."""
    made = make_app("ingest", resumable=["crawl-shards", "index"], rich_markup_mode=None)
    made.callback()(options)
    for name in names:
        made.command(name)(import_function(COMMANDS[name]))
    return made


def options(debug: Debug = False, version: Version = False) -> None:
    """Turn images nobody curated into sealed, checkable datasets."""
    logging.basicConfig(level=logging.INFO, format="ingest: %(message)s")
    # What Pillow warns of in a damaged file stands in that file's row, with its name.
    warnings.filterwarnings("ignore", module="PIL")


def main() -> None:
    """The console script. To import all commands takes longer than most of them do: one is named, mostly."""
    named = next((word for word in sys.argv[1:] if word != "--debug"), None)
    run(app([named] if named in COMMANDS else COMMANDS))
