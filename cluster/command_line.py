"""What the two programs have in common: a mistake, trouble with files and Ctrl-C each end in one line."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cluster.errors import UserError
from cluster.output_trouble import trouble
from cluster.wording import visible

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _tell_version(ctx: Any, asked: bool) -> None:
    if asked:
        typer.echo(f"{ctx.command.name} {metadata.version('seer-pipeline')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit."),
]


class Commands(TyperGroup):
    """Ends a command with one line and an exit status: 2 if the user can mend what went wrong, 130 on Ctrl-C.

    The context's object names the commands that go on where they were interrupted.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if ctx.params["debug"]:
                raise
            _end(ctx, str(error), 2)
        except OSError as error:
            told = trouble(error)
            if told is None or ctx.params["debug"]:
                raise
            _end(ctx, str(told), 2)
        except KeyboardInterrupt:
            resumable = ctx.invoked_subcommand in ctx.obj
            go_on = "; run the same command again to go on where it stopped" if resumable else ""
            _end(ctx, f"interrupted{go_on}", 130)


def _end(ctx: Any, sentence: str, status: int) -> None:
    typer.echo(f"{ctx.command.name}: {visible(sentence)}", err=True)
    raise typer.Exit(status) from None


def make_app(name: str, *, resumable: Sequence[str] = (), **options: Any) -> typer.Typer:
    """A program without commands yet; its callback has to take `Debug`.

    Args:
        name: of the program.
        resumable: commands that go on where they were interrupted.
        options: of Typer.
    """
    return typer.Typer(
        name=name,
        cls=Commands,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "obj": frozenset(resumable)},
        **options,
    )


def run(app: typer.Typer) -> None:
    """The console script. `--debug` may stand anywhere on the line."""
    atexit.register(gc.freeze)  # what goes with the process is not looked through for garbage first
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    app(arguments, prog_name=app.info.name)
