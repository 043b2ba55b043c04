"""The `ingest` command: images in the wild become sealed datasets, and datasets are looked at and checked."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from cluster.doctor import doctor_report, doctor_table
from cluster.errors import UserError
from ingest.doctor import image_checks


class Commands(TyperGroup):
    """Ends a command on a mistake of the user, or on Ctrl-C, with one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"ingest: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("ingest: interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="ingest",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Turn images nobody curated into sealed, checkable datasets."""


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="Where datasets would be written.")] = Path(),
    as_json: Json = False,
) -> None:
    """Say what is installed and active, and how to mend what is not."""
    checks = [*image_checks(), *doctor_report(folder)]
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        Console().print(doctor_table(checks))
    if any(check.required and check.status == "missing" for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """The console script. `--debug` may stand anywhere on the line."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    app(arguments, prog_name="ingest")
