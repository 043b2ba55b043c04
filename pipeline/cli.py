"""The `submit` command: train, evaluate, and look after runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from cluster.command_line import Debug, make_app, run
from cluster.rank.process import OPENMP_SETTINGS
from pipeline.commands import compare, dag, evaluate, plan, preflight, pretrain, runs, transfer

app = make_app("submit")


@app.callback()
def options(debug: Debug = False) -> None:
    """Train trunks on images nobody curated, and see how well they transfer."""


COMMANDS: list[Callable[..., None]] = [
    pretrain.pretrain,
    pretrain.resume,
    dag.dag,
    evaluate.evaluate,
    evaluate.schedule,
    transfer.export,
    transfer.knn,
    transfer.linear,
    compare.compare,
    runs.status,
    runs.logs,
    runs.cancel,
    preflight.preflight,
    plan.plan,
    runs.doctor,
]
for command in COMMANDS:
    app.command()(command)
app.command("list")(runs.list_names)


def main() -> None:
    """The console script."""
    for name, value in OPENMP_SETTINGS.items():
        os.environ.setdefault(name, value)  # read when torch is imported, which no command has done yet
    logging.basicConfig(format="%(asctime)s %(message)s")
    for floor in ("cluster", "ingest", "pipeline"):
        logging.getLogger(floor).setLevel(logging.INFO)
    run(app)


if __name__ == "__main__":
    main()
