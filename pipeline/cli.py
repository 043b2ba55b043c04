"""The `submit` command: train, evaluate, and look after runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from cluster.command_line import Debug, Version, make_app, run
from cluster.rank.process import OPENMP_SETTINGS
from pipeline.commands import (
    compare,
    dag,
    evaluate,
    features,
    finetune,
    follow,
    hashtags,
    init_site,
    plan,
    preflight,
    pretrain,
    report,
    runs,
    serve,
    transfer,
)
from pipeline.transfer.evaluations import EVALUATIONS

app = make_app("submit")


@app.callback()
def options(debug: Debug = False, version: Version = False) -> None:
    """Train trunks on images nobody curated, and see how well they transfer."""


COMMANDS: dict[str, Callable[..., None]] = {
    "pretrain": pretrain.pretrain,
    "finetune": finetune.finetune,
    "resume": pretrain.resume,
    "hashtags": hashtags.hashtags,
    "dag": dag.dag,
    "evaluate": evaluate.evaluate,
    "schedule": evaluate.schedule,
    "export": transfer.export,
    "features": features.features,
    **{name: transfer.evaluation_command(name) for name in EVALUATIONS},
    "cross_modal": transfer.cross_modal,
    "predict": transfer.predict,
    "report": report.report,
    "compare": compare.compare,
    "follow": follow.follow,
    "status": runs.status,
    "logs": runs.logs,
    "cancel": runs.cancel,
    "serve": serve.serve,
    "init-site": init_site.init_site,
    "preflight": preflight.preflight,
    "plan": plan.plan,
    "doctor": runs.doctor,
    "list": runs.list_names,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


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
