"""The `ingest` command: images in the wild become sealed datasets, and datasets are looked at and checked."""

import logging
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cluster.errors import UserError
from cluster.wording import visible
from ingest.commands.card import card
from ingest.commands.crawl import crawl
from ingest.commands.dedup import dedup
from ingest.commands.doctor import doctor
from ingest.commands.gc import gc
from ingest.commands.index import index
from ingest.commands.retry import retry
from ingest.commands.show import show
from ingest.commands.stats import stats
from ingest.commands.urls import urls
from ingest.commands.verify import verify
from ingest.commands.view import view


class Commands(TyperGroup):
    """Ends a command on a mistake of the user, or on Ctrl-C, with one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"ingest: {visible(str(error))}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            resumable = ctx.invoked_subcommand in ("crawl-shards", "index")
            go_on = "; run the same command again to go on where it stopped" if resumable else ""
            typer.echo(f"ingest: interrupted{go_on}", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="ingest",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Turn images nobody curated into sealed, checkable datasets."""
    logging.basicConfig(level=logging.INFO, format="ingest: %(message)s")
    # What Pillow warns of in a damaged file stands in that file's row, with its name.
    warnings.filterwarnings("ignore", module="PIL")


app.command("crawl-shards")(crawl)
app.command()(urls)
app.command()(index)
app.command()(retry)
app.command()(verify)
app.command()(stats)
app.command()(show)
app.command()(dedup)
app.command()(view)
app.command()(card)
app.command()(gc)
app.command()(doctor)


def main() -> None:
    """The console script. `--debug` may stand anywhere on the line."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    app(arguments, prog_name="ingest")
