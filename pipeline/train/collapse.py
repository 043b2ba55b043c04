"""When the numbers of a run say that its embeddings have collapsed; to say so takes no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Below these the embeddings are one point, lie on one line, use one prototype, or all prototypes alike.
COLLAPSED_BELOW = {
    "embedding_std": 0.1,
    "rankme": 2.0,
    "prototype_entropy": math.log(2),
    "assignment_information": 0.01,
}


def signs_of_collapse(values: Mapping[str, Any]) -> list[str]:
    """The indicators in a row of metrics that are below their thresholds."""
    return [name for name, threshold in COLLAPSED_BELOW.items() if values.get(name, math.nan) < threshold]
