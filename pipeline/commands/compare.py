"""`submit compare`: runs side by side, as a table and as a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.atomic_file import write_atomically
from cluster.errors import UserError
from cluster.wording import visible
from pipeline.commands.options import Json, Runs
from pipeline.commands.runs import WIDE, find_run

if TYPE_CHECKING:  # it imports torch, and `submit --help` does not
    from pipeline.report.compare import ComparedRun

COLUMNS = (("loss", "loss"), ("embedding_std", "embedding std"), ("rankme", "RankMe"), ("knn", "kNN %"))


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Names of runs, or their folders.")],
    out: Annotated[Path, typer.Option("--out", dir_okay=False, help="The page to write.")] = Path(
        "compare.html"
    ),
    folder: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Compare runs: what differs between their recipes, how they went, and which of them collapsed."""
    from pipeline.recipe.stages import CompareRecipe
    from pipeline.report.compare import compare_runs, comparison_page

    found = compare_runs(_by_name([find_run(run, folder).path for run in runs]))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, comparison_page(found, CompareRecipe()))
    if as_json:
        typer.echo(json.dumps([run.to_json() for run in found], indent=2))
        return
    # In a pipe or a file there is no width to fit into.
    Console(width=None if sys.stdout.isatty() else WIDE, highlight=False).print(_table(found))
    typer.echo(f"page: {out}")


def _by_name(folders: Sequence[Path]) -> dict[str, Path]:
    """Runs by the names of their folders, or by their paths where two have one name."""
    alike = len({folder.name for folder in folders}) < len(folders)
    named = {str(folder) if alike else folder.name: folder for folder in folders}
    if len(named) < len(folders):
        raise UserError("a run is named twice; name each once")
    return named


def _table(runs: Sequence[ComparedRun]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("differs in", overflow="fold")
    for heading in ("steps", *(heading for _, heading in COLUMNS)):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("collapse")
    for run in runs:
        numbers = [run.last.get(key) for key, _ in COLUMNS]
        cells = [
            run.name,
            ", ".join(run.differs_in()),
            str(run.last["step"]),
            *("" if number is None else f"{number:.4g}" for number in numbers),
            ", ".join(f"{sign.name} {sign.value:.2g} at step {sign.step}" for sign in run.collapse),
        ]
        # As text: what stands in a folder is no markup, and moves no cursor.
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return table
