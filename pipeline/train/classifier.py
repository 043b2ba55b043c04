"""What follows a training with labels: the classifier is exported, and shown the test set if there is one."""

from __future__ import annotations

import json
import logging

from cluster.atomic_file import write_atomically
from ingest.dataset.open import open_dataset
from pipeline.data.node_cache import CachePlace
from pipeline.train.setup import Training
from pipeline.transfer.predict import predict_together, read_predictions, summarise
from pipeline.trunks.classifier import load_classifier
from pipeline.trunks.export import export_classifier

logger = logging.getLogger(__name__)


def finish_classifier(t: Training) -> None:
    """Write RUN/classifier; of a test set, which all ranks share, RUN/predictions.parquet and RUN/test.json.

    Called on all ranks together, when every step is done: a run that is stopped here comes back to it.
    """
    folder, test = t.run.path, t.recipe.test
    t.watchdog.busy("exporting the classifier")
    if t.world.is_first:
        export_classifier(folder, folder / "classifier")
    t.world.barrier()
    if test is None:
        return
    predictions = folder / "predictions.parquet"
    predict_together(
        load_classifier(folder / "classifier").to(t.world.device),
        open_dataset(test.root, sealed=test.sealed, view=test.view),
        test.predict,
        predictions,
        world=t.world,
        workers=t.recipe.run.workers,
        cache=CachePlace.of(t.recipe.run),
        busy=t.watchdog.busy,
    )
    if not t.world.is_first:
        return
    scores = summarise(read_predictions(predictions))
    write_atomically(folder / "test.json", json.dumps(scores, indent=2) + "\n")
    logger.info(
        "test: top-1 %.2f %% (95 %% interval %.2f to %.2f) of %d images",
        100 * scores["top1"],
        100 * scores["top1_low"],
        100 * scores["top1_high"],
        scores["samples"],
    )
