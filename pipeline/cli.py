"""The `submit` command: train, evaluate, and look after runs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cluster.errors import UserError
from cluster.rank.process import OPENMP_SETTINGS
from pipeline.commands import compare, dag, evaluate, plan, preflight, pretrain, runs, transfer
from pipeline.transfer.evaluations import EVALUATIONS


class Commands(TyperGroup):
    """Ends a command on a mistake of the user, or on Ctrl-C, with one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"submit: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("submit: interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="submit",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train trunks on images nobody curated, and see how well they transfer."""


COMMANDS: dict[str, Callable[..., None]] = {
    "pretrain": pretrain.pretrain,
    "resume": pretrain.resume,
    "dag": dag.dag,
    "evaluate": evaluate.evaluate,
    "schedule": evaluate.schedule,
    "export": transfer.export,
    **{name: transfer.evaluation_command(name) for name in EVALUATIONS},
    "compare": compare.compare,
    "status": runs.status,
    "logs": runs.logs,
    "cancel": runs.cancel,
    "preflight": preflight.preflight,
    "plan": plan.plan,
    "doctor": runs.doctor,
    "list": runs.list_names,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """The console script. `--debug` may stand anywhere on the line."""
    for name, value in OPENMP_SETTINGS.items():
        os.environ.setdefault(name, value)  # read when torch is imported, which no command has done yet
    logging.basicConfig(format="%(asctime)s %(message)s")
    for floor in ("cluster", "ingest", "pipeline"):
        logging.getLogger(floor).setLevel(logging.INFO)
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    app(arguments, prog_name="submit")


if __name__ == "__main__":
    main()
