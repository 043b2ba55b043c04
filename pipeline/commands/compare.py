"""`submit compare`: runs side by side, or classifiers on the same images, as a table and as a page."""

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
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN...", help="Names or folders of runs; or files of predictions."),
    ],
    out: Annotated[Path, typer.Option("--out", dir_okay=False, help="The page to write.")] = Path(
        "compare.html"
    ),
    folder: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Compare runs: how their recipes differ, how they went, and which of them collapsed. Or compare
    classifiers by their predictions.parquet on the same images.
    """
    from pipeline.recipe.stages import CompareRecipe
    from pipeline.report.compare import compare_runs, comparison_page

    if all(run.endswith(".parquet") for run in runs):
        _compare_classifiers([Path(run) for run in runs], out, as_json=as_json)
        return
    if mixed := [run for run in runs if run.endswith(".parquet") and Path(run).is_file()]:
        raise UserError(
            f"{mixed[0]} holds predictions, and others are runs: name predictions alone, such as "
            "RUN/predictions.parquet, or runs alone"
        )
    found = compare_runs(_by_name([find_run(run, folder).path for run in runs]))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, comparison_page(found, CompareRecipe()))
    if as_json:
        typer.echo(json.dumps([run.to_json() for run in found], indent=2))
        return
    # In a pipe or a file there is no width to fit into.
    Console(width=None if sys.stdout.isatty() else WIDE, highlight=False).print(_table(found))
    typer.echo(f"page: {out}")


def _compare_classifiers(files: Sequence[Path], out: Path, *, as_json: bool) -> None:
    from pipeline.report.classifiers import classifiers_page
    from pipeline.transfer.compare import compare_predictions
    from pipeline.transfer.predict import read_predictions

    if len(set(files)) < len(files):
        raise UserError("a file is named twice: name each once")
    # runs/A/predictions.parquet is called A, unless there are two of them.
    short = [file.absolute().parent.name if file.stem == "predictions" else file.stem for file in files]
    names = short if len(set(short)) == len(short) else [str(file) for file in files]
    found = compare_predictions(
        {name: read_predictions(file) for name, file in zip(names, files, strict=True)}
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, classifiers_page(found, "Classifiers compared"))
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    for name, scores in found.scores.items():
        low, high = 100 * scores["top1_low"], 100 * scores["top1_high"]
        typer.echo(f"{name}: {100 * scores['top1']:.2f} % ({low:.2f} to {high:.2f})")
    for pair in found.pairs:
        low, high = 100 * pair.paired.interval.low, 100 * pair.paired.interval.high
        verdict = f"{pair.better} is better" if pair.better else "not decided"
        typer.echo(
            f"{pair.second} less {pair.first}: {100 * pair.paired.difference:+.2f} points "
            f"({low:+.2f} to {high:+.2f}), p {pair.p:.2g}: {verdict}"
        )
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
            ", ".join([*([f"branch of {run.branch}"] if run.branch else []), *run.differs_in()]),
            str(run.last["step"]),
            *("" if number is None else f"{number:.4g}" for number in numbers),
            ", ".join(f"{sign.name} {sign.value:.2g} at step {sign.step}" for sign in run.collapse),
        ]
        # As text: what stands in a folder is no markup, and moves no cursor.
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return table
