"""The scores among the inputs of a report on videos: `knn_video` of AVID's trunk for pictures,
`few_shot_audio` of the one for sound; `…_cma` after CMA, `…_random` of the same architecture with drawn
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError
from pipeline.dag.stage import Input
from pipeline.transfer.evaluations import EVALUATIONS

MODALITIES = {"video": "pictures", "audio": "sound"}
TRUNKS = {"": "AVID", "_cma": "AVID, then CMA", "_random": "random trunk"}
_ACCURACIES = [name for name, row in EVALUATIONS.items() if row.metric == "top1"]
CLIP_SCORES = {
    f"{evaluation}_{modality}{trunk}": (evaluation, modality, trunk)
    for evaluation in _ACCURACIES
    for modality in MODALITIES
    for trunk in TRUNKS
}


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """An evaluation of a modality: by trunk, a key of `TRUNKS`, its metrics."""

    evaluation: str
    modality: str
    metrics: dict[str, dict[str, Any]]

    @property
    def title(self) -> str:
        """For people."""
        return f"{EVALUATIONS[self.evaluation].title}, {MODALITIES[self.modality]}"


def score_rows(inputs: Mapping[str, Input]) -> list[ScoreRow]:
    """All scores that a report is given.

    Raises:
        UserError: if there is none.
    """
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for role, (evaluation, modality, trunk) in CLIP_SCORES.items():
        if role in inputs:
            found.setdefault((evaluation, modality), {})[trunk] = inputs[role].receipt.metrics
    if not found:
        raise UserError(
            "a report on videos shows how trunks score: give it one input at least, such as knn_video, "
            "few_shot_audio or knn_video_random"
        )
    return [
        ScoreRow(evaluation=evaluation, modality=modality, metrics=metrics)
        for (evaluation, modality), metrics in found.items()
    ]
