"""The `ingest` command: images in the wild become sealed datasets, and datasets are looked at and checked."""

import logging
import warnings

from cluster.command_line import Debug, make_app, run
from cluster.job import stays

with stays():
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

app = make_app("ingest", resumable=["crawl-shards", "index"], rich_markup_mode=None)


@app.callback()
def options(debug: Debug = False) -> None:
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
    """The console script."""
    run(app)
