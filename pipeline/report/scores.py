"""The scores among the inputs of the report: `knn` of the trained trunk, `knn_random`, `linear_pixels`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cluster.errors import UserError
from pipeline.dag.stage import Input
from pipeline.transfer.evaluations import EVALUATIONS

SCORED_TRUNKS = {"trained": "trained trunk", "random": "random trunk", "pixels": "raw pixels"}
# Role of an input → the evaluation and the trunk that it is a score of.
SCORES = {
    evaluation if trunk == "trained" else f"{evaluation}_{trunk}": (evaluation, trunk)
    for evaluation, row in EVALUATIONS.items()
    if row.metric == "top1"  # the report compares accuracies
    for trunk in SCORED_TRUNKS
}

# The same of images with several labels, which the report has a table for.
SEVERAL_LABELS = {"svm" if trunk == "trained" else f"svm_{trunk}": trunk for trunk in SCORED_TRUNKS}


def scores_given(inputs: Mapping[str, Input]) -> dict[str, dict[str, dict[str, Any]]]:
    """Evaluation → trunk → metrics, of the scores among a report's inputs.

    Raises:
        UserError: if an evaluation has no score of the trained trunk, or there is none at all.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for role, (evaluation, trunk) in SCORES.items():
        if role in inputs:
            found.setdefault(evaluation, {})[trunk] = inputs[role].receipt.metrics
    if not found:
        raise UserError(
            f"a report shows how a trunk scores: give it one input at least of {', '.join(SCORES)}"
        )
    for evaluation, scores in found.items():
        if "trained" not in scores:
            raise UserError(
                f"the report has a score {evaluation} of the {SCORED_TRUNKS[next(iter(scores))]}, and none "
                f"of the trained trunk to hold it against: give it the input {evaluation}, too"
            )
    return found


def several_labels(inputs: Mapping[str, Input]) -> dict[str, dict[str, Any]]:
    """Trunk → metrics, of the scores of images with several labels among a report's inputs."""
    return {trunk: inputs[role].receipt.metrics for role, trunk in SEVERAL_LABELS.items() if role in inputs}


def shots_in(of_trunks: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """From how many images of each label machines have learnt, beside those that learn from all."""
    names = {name for metrics in of_trunks.values() for name in metrics}
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"map_(\d+)_shots", name)))
