"""`submit status|list|logs|cancel|doctor`: what runs, how it is, and ending it."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.doctor import doctor_report, doctor_table
from cluster.errors import UserError
from cluster.executors import Look, settled, status_of
from cluster.executors import cancel as cancel_run
from cluster.job import State
from cluster.run.folder import RunFolder, list_runs
from cluster.run.status import in_words
from cluster.run.trust import CONTROLS, refuse_untrusted
from cluster.site import users_site
from cluster.site_doctor import site_findings
from cluster.wording import visible
from pipeline.commands.options import Json, RunName, Runs, Trust
from pipeline.train.branch import Parent
from pipeline.train.look import UNREADABLE, look_at, name_in
from pipeline.train.steering import Change

CANCEL_PATIENCE = 60.0  # seconds
WIDE = 200  # characters


def status(
    run: Annotated[str | None, typer.Argument(help="A run's name or folder; by default all runs.")] = None,
    folder: Runs = Path("runs"),
    state: Annotated[
        str | None,
        typer.Option("--state", help=f"Show only runs that are {', '.join(State)} or {UNREADABLE}."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the state of each run, and the reason for it."""
    if state is not None and state not in (*State, UNREADABLE):
        raise UserError(f"--state {state}: a run is {', '.join(State)} or {UNREADABLE}")
    looked_at = list_runs(folder) if run is None else [find_run(run, folder)]
    look = Look(looked_at)
    found = [look_at(each, name_in(folder, each), look.status) for each in looked_at]
    found = [each for each in found if state in (None, each["state"])]
    if as_json:
        typer.echo(json.dumps(found if run is None else found[0], indent=2))
    elif not found:
        none = "no runs" if state is None else f"no run that is {state}"
        typer.echo(f"{none} in {folder}; `submit pretrain` starts one")
    else:
        # In a pipe or a file there is no width to fit into.
        Console(width=None if sys.stdout.isatty() else WIDE).print(_table(found))
    unreadable = [each for each in found if each["state"] == UNREADABLE]
    for each in unreadable:
        typer.echo(visible(f"{each['run']}: {each['why']}"), err=True)
    if run is not None and not as_json and not unreadable:
        _tell_more(found[0])


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    columns = (
        "run",
        "state",
        "where",
        "submitted",
        "step",
        "loss",
        "images/s",
        "left",
        "checkpoint",
        "restarts",
        "GPU-hours",
    )
    for column in columns:
        left = column in ("run", "state", "where", "submitted", "checkpoint", "restarts")
        table.add_column(column, justify="left" if left else "right")
    for run in found:
        cells = [run["run"], run["state"]] if run["state"] == UNREADABLE else _cells(run)
        # As text: what stands in a folder is no markup, and moves no cursor.
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return table


def _cells(run: dict[str, Any]) -> list[str]:
    progress, running = run["progress"], run["state"] == State.RUNNING
    loss, rate = progress.get("loss"), progress.get("images_per_second")
    collapse = ", collapse" if progress.get("warnings") else ""
    causes = Counter(str(restart["cause"]) for restart in run["restarts"])
    return [
        run["run"],
        in_words(run["state"], reason=run["reason"], since=run["since"]) + collapse,
        f"{run['executor']} {run['id']}" if run["executor"] != "local" else "local",
        _date(run["submitted"])[:-3],
        f"{progress['step']}/{progress['total_steps']}" if progress else "",
        "" if loss is None else f"{loss:.4f}",
        f"{rate:.0f}" if running and rate is not None else "",
        f"{progress['seconds_left'] / 60:.0f} min" if running and progress else "",
        run["checkpoint"] or "",
        ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items())),
        f"{run['gpu_hours']:.1f}" if run["gpus"] else "",
    ]


def _tell_more(run: dict[str, Any]) -> None:
    """One run in more words: why it is where it is, and what happened to it before."""
    for line in run["why"].splitlines():
        typer.echo(visible(line))
    if run["nodes"]:
        typer.echo(visible(f"attempt {run['attempt']} on {run['nodes']}, {run['ranks']} ranks"))
    if run["unwatched"]:
        typer.echo(visible(run["unwatched"]))
    if run["progress"].get("waits_for"):
        typer.echo(visible(f"its end waits for {run['progress']['waits_for']}"))
    for warning in run["progress"].get("warnings", []):
        typer.echo(visible(warning))
    if run["parent"]:
        typer.echo(visible(f"branched off {_date(run['parent']['time'])} from {Parent(**run['parent'])}"))
    for change in run["changes"]:
        typer.echo(visible(f"changed {_date(change['time'])} {Change(**change)}"))
    for restart in run["restarts"]:
        when = _date(restart["time"])
        who = [f"rank {restart['rank']}"] if restart["rank"] is not None else []
        who += [f"on {restart['node']}"] if restart["node"] else []
        blame = f" ({' '.join(who)})" if who else ""
        saved = restart["checkpoint"] or "nothing saved"
        typer.echo(
            visible(
                f"attempt {restart['attempt']} ended {when}: {restart['cause']}{blame}: "
                f"{restart['message']} [{saved}]"
            )
        )

    for name in run["set_aside"]:
        typer.echo(visible(f"a damaged checkpoint was set aside: {run['folder']}/checkpoints/{name}"))


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # damaged, and no reason to say nothing else
        return "at no time"


def list_names(folder: Runs = Path("runs"), as_json: Json = False) -> None:
    """List the names of the runs, one per line."""
    names = [name_in(folder, run) for run in list_runs(folder)]
    typer.echo(json.dumps(names) if as_json else "\n".join(map(visible, names)))


def find_run(run: str, folder: Path) -> RunFolder:
    """A run by its folder, or by its name below `folder`.

    Raises:
        UserError: if there is none.
    """
    for path in (Path(run), folder / run):
        if (path / "status.json").is_file():
            return RunFolder(path)
    raise no_run(run, folder)


def no_run(run: str | Path, folder: Path) -> UserError:
    """What to raise of a run that is not there."""
    return UserError(
        f"there is no run {run}: neither {run} nor {folder / run} is the folder of one; `submit status` "
        "lists the runs"
    )


def logs(
    run: RunName,
    rank: Annotated[int, typer.Option("--rank", min=0, help="The rank whose log to print.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the run ends.")] = False,
    lines: Annotated[
        int | None,
        typer.Option("--lines", "-n", min=1, help="Print only the last N lines; with -f, start with them."),
    ] = None,
    folder: Runs = Path("runs"),
) -> None:
    """Print the log of one rank."""
    found = find_run(run, folder)
    if not found.log(rank).is_file():
        raise UserError(
            f"{found.path} has no log of rank {rank}: it has ranks 0 to {found.read_status().ranks - 1}"
        )
    raw = not sys.stdout.isatty()  # to a program the log itself; to a terminal nothing that would steer it
    texts = found.follow(rank, status=status_of, lines=lines) if follow else found.log_text(rank, lines=lines)
    for text in texts:
        typer.echo(text if raw else visible(text, but="\n\r\t"), nl=False)


def cancel(run: RunName, folder: Runs = Path("runs"), trust: Trust = False) -> None:
    """Stop a run; it saves a checkpoint first."""
    found = find_run(run, folder)
    if not trust:
        refuse_untrusted(found.path, CONTROLS, groups=users_site().trusted_groups)
    cancel_run(found)
    deadline = time.monotonic() + CANCEL_PATIENCE
    while not (state := settled(found).state).ended and time.monotonic() < deadline:
        time.sleep(1.0)
    waits = "" if state.ended else "; it was asked to end, and has not yet"
    typer.echo(f"{found.path.name} is {state}{waits}")


def doctor(
    folder: Annotated[Path, typer.Argument(help="The folder that runs would be written to.")] = Path(),
    as_json: Json = False,
) -> None:
    """Check what is installed and working, and say how to fix what is not."""
    from ingest.image.doctor import image_checks

    checks = [*image_checks(), *doctor_report(folder), *site_findings()]
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        Console().print(doctor_table(checks))
    if any(check.required and check.status == "missing" for check in checks):
        raise typer.Exit(1)
