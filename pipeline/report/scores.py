"""The scores among the inputs of the report: `knn` of the trained trunk, `knn_random`, `linear_pixels`."""

from __future__ import annotations

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
